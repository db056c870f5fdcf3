"""Trainings on Ray Train: what each worker does.

Ray and the loop meet here only. The checkpoint is the loop's own file in the run's folder, so a
worker that is started again, a driver that was killed and a training in this process all go on in
the same way, and Ray's habit of resuming a run name silently never comes into play.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hashtab.features.dataset import Dataset
from hashtab.pipelines.checkpoints import CheckpointError, DiskFullError, Progress
from hashtab.pipelines.evaluation import Predictions, predict
from hashtab.pipelines.events import Teller
from hashtab.pipelines.ranks import Ranks
from hashtab.pipelines.runs import Result, Run
from hashtab.pipelines.saved_model import save_model
from hashtab.pipelines.settings import TrainSettings
from hashtab.pipelines.training import Training, train

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


def fit(runs: Sequence[Run], *, apart: bool = False) -> None:
    """Train runs on one group of workers, as their settings (alike in this) say.

    Args:
        runs: to train, one after another.
        apart: each worker trains whole runs by itself, in place of all sharing each.

    Raises:
        CheckpointError: if a checkpoint is of another training, or cannot be read or written.
        ray.train.TrainingFailedError: if a worker raised, or was lost too often.
    """
    from ray.train import WorkerGroupError

    try:
        refused = _trainer(runs, apart).fit().return_value
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, CheckpointError):
                raise failure from error
        raise
    if refused is not None:
        raise CheckpointError(refused)


def _trainer(runs: Sequence[Run], apart: bool) -> "TorchTrainer":
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    settings = runs[0].settings
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    return TorchTrainer(
        _work,
        train_loop_config={"runs": list(runs), "apart": apart},
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpu,
            resources_per_worker={"CPU": settings.threads, **({"GPU": 1} if settings.gpu else {})},
        ),
        run_config=RunConfig(
            name=f"{runs[0].name}/ray",
            storage_path=settings.storage,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _work(config: dict[str, Any]) -> str | None:
    """Train on one of Ray Train's workers; return why the checkpoint was refused, if it was."""
    try:
        _train_share(**config)
    except CheckpointError as error:
        # Where this worker alone meets it, Ray is to end the others, which may wait for this one,
        # and hands on no value but the first worker's.
        if config["apart"] or isinstance(error, DiskFullError):
            raise
        return str(error)  # all refuse alike: raised, it would be retried, which cannot help
    return None


def _train_share(runs: list[Run], apart: bool) -> None:
    import ray.train

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    device = _device(runs[0].settings)
    torch.set_num_threads(runs[0].settings.threads)
    if apart:
        for run in runs[rank::size]:
            train_run(run, Ranks(device=device))
        return
    for run in runs:
        # In this process (workers = 0) there is no controller to report to.
        train_run(run, Ranks(rank, size, device), in_step=run.settings.workers > 0)


def _device(settings: TrainSettings) -> torch.device:
    import ray.train.torch

    if not settings.gpu:
        return torch.device("cpu")
    device: torch.device = ray.train.torch.get_device()
    torch.cuda.set_device(device)
    return device


def train_run(run: Run, ranks: Ranks, *, in_step: bool = False) -> None:
    """Train one run to its end on this worker and store what came out; a finished one is skipped.

    Args:
        run: to train.
        ranks: this worker among those that share the run.
        in_step: whether they are Ray Train's workers, which report each epoch together.
    """
    if run.finished:
        return
    dataset = Dataset.open(run.settings.data)
    teller = Teller(run.log, run.settings.optimiser.epochs)

    def listen(event: str, progress: Progress) -> None:
        if ranks.first:
            teller(event, progress)
        if in_step and event == "epoch":
            import ray.train

            ray.train.report({"epoch": progress.epoch, **progress.epochs[-1].validation})

    training = Training(run.settings, dataset, run.checkpoint, ranks)
    model, progress = train(training, listen)
    found = {
        split: predict(model, dataset, split, run.settings.optimiser, ranks)
        for split in dataset.manifest.splits
        if split == "validation" or split.startswith("test")
    }
    if not ranks.first:
        return
    save_model(run.model, model, dataset.manifest)
    run.finish(_result(run, model, progress, {k: v for k, v in found.items() if v is not None}))


def _result(
    run: Run, model: torch.nn.Module, progress: Progress, found: dict[str, Predictions]
) -> Result:
    return Result(
        name=run.name,
        best_epoch=progress.best,
        epochs=progress.epochs,
        metrics={split: predictions.metrics() for split, predictions in found.items()},
        calibration={split: predictions.calibration() for split, predictions in found.items()},
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=progress.total_seconds,
    )
