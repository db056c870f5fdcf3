"""The training loop, free of Ray and MLflow: epochs of whole-user batches, each made from the seed.

The order of an epoch and the dropout of a step are functions of seed, epoch and step, so that a
training which goes on from a checkpoint does the same arithmetic as one that never stopped. On a
CPU it ends with the same bits; on a GPU gradients of an embedding's rows are added in any order.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from hashtab.features.dataset import Batch, Dataset
from hashtab.models.ctr import ClickModel, FeatureSpec, TensorBatch
from hashtab.models.ctr.on_gpu import compiled, mixed_precision
from hashtab.pipelines import checkpoints
from hashtab.pipelines.checkpoints import Epoch, Progress
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.evaluation import predict
from hashtab.pipelines.ranks import Ranks
from hashtab.pipelines.settings import TrainSettings, identity

# Each reading of a loss waits until the GPU has done all that it was given.
_STEPS_BETWEEN_READINGS = 20

Listener = Callable[[Literal["start", "step", "epoch"], Progress], None]


@dataclass(frozen=True)
class Training:
    """One training on one worker.

    Args:
        settings: of the training.
        dataset: to train on.
        checkpoint: file of the last checkpoint, whether there is one or not.
        ranks: this worker among all.
    """

    settings: TrainSettings
    dataset: Dataset
    checkpoint: Path
    ranks: Ranks

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result."""
        return identity(self.settings, self.dataset.manifest.digest)


def train(training: Training, listen: Listener) -> tuple[ClickModel, Progress]:
    """Train from the beginning or the last checkpoint to the end.

    Args:
        training: what to train.
        listen: told of each finished epoch and each step, on a GPU of each 20th, on every worker.

    Returns:
        The model with the weights of the best epoch, and the progress.

    Raises:
        CheckpointError: if the checkpoint is of another training.
    """
    model, optimiser = build(training)
    settings, ranks = training.settings.optimiser, training.ranks
    batches = training.dataset.n_batches("train", _samples_per_batch(training), ranks.size)
    progress = checkpoints.restore(
        training.checkpoint, training.identity, batches, model, optimiser
    )
    forward = _forward(model, ranks)
    listen("start", progress)
    while progress.epoch < settings.epochs and progress.waited() < settings.patience:
        progress = train_epoch(training, forward, model, optimiser, progress, listen)
        progress = _close_epoch(training, model, progress)
        _save(training, progress, model, optimiser)
        listen("epoch", progress)
    model.load_state_dict(progress.best_model)
    return model, progress


def check(settings: TrainSettings, dataset: Dataset) -> None:
    """Find out before any long work whether the data can serve the settings.

    Raises:
        SettingsError: if the model cannot be made for this data.
        DataError: if a split has fewer users than there are workers.
    """
    spec = FeatureSpec.from_dict(asdict(dataset.manifest.features))
    try:
        with torch.device("meta"):
            ClickModel(spec, settings.model)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    for split in dataset.manifest.splits:
        dataset.n_batches(split, settings.optimiser.samples_per_batch, max(1, settings.workers))


def train_epoch(
    training: Training,
    forward: nn.Module,
    model: ClickModel,
    optimiser: Optimizer,
    progress: Progress,
    listen: Listener,
) -> Progress:
    """Take the remaining steps of the epoch under way."""
    forward.train()
    begun, before = time.perf_counter(), progress
    unread = torch.zeros(2, dtype=torch.float64, device=training.ranks.device)
    for batch in _batches(training, progress):
        unread += step(training, forward, optimiser, progress, batch)
        progress = replace(progress, batch=progress.batch + 1)
        saves = _saves(training, progress)
        if not (saves or _reads(training, progress)):
            continue
        loss, samples = unread.tolist()
        unread.zero_()
        seconds = time.perf_counter() - begun
        progress = replace(
            progress,
            loss=progress.loss + loss,
            samples=progress.samples + int(samples),
            seconds=before.seconds + seconds,
            total_seconds=before.total_seconds + seconds,
        )
        if saves:
            _save(training, progress, model, optimiser)
        listen("step", progress)
    return progress


def _saves(training: Training, progress: Progress) -> bool:
    every = training.settings.checkpoint_every
    return progress.batch % every == 0 and progress.batch < progress.batches


def _reads(training: Training, progress: Progress) -> bool:
    every = 1 if training.ranks.device.type == "cpu" else _STEPS_BETWEEN_READINGS
    return progress.batch % every == 0 or progress.batch == progress.batches


def step(
    training: Training, forward: nn.Module, optimiser: Optimizer, progress: Progress, batch: Batch
) -> Tensor:
    """Take one optimiser step; return the summed loss and the samples of all workers.

    The gradient is that of the mean loss over these samples. Nothing here waits for a GPU but what
    the encoder's kernel does: its definition reads offsets on the host, Triton's does not.

    Returns:
        `[2]` float64 on this worker's device.
    """
    ranks, settings = training.ranks, training.settings
    total = progress.batches * settings.optimiser.epochs
    fall = falling(settings.optimiser.schedule, progress.step / total)
    for group in optimiser.param_groups:
        group["lr"] = fall * group["initial_lr"]
    torch.manual_seed(seed_of(settings.seed, progress.epoch, progress.batch, ranks.rank))
    tensors = TensorBatch.from_numpy(batch).to(ranks.device)
    with mixed_precision(ranks.device):
        logits = forward(tensors)
    loss = binary_cross_entropy_with_logits(logits, tensors.labels, reduction="sum")
    samples = torch.full_like(loss, len(batch.labels), dtype=torch.float64)
    totals = ranks.total(torch.stack([loss.detach().double(), samples]))
    optimiser.zero_grad(set_to_none=True)
    # Workers' gradients are averaged, so each brings its share of the mean times their number.
    (loss * (ranks.size / totals[1])).backward()
    optimiser.step()
    return totals


def build(training: Training) -> tuple[ClickModel, Optimizer]:
    """Make the model and its optimiser from settings and seed alone."""
    settings = training.settings.optimiser
    spec = FeatureSpec.from_dict(asdict(training.dataset.manifest.features))
    torch.manual_seed(seed_of(training.settings.seed))
    model = ClickModel(spec, training.settings.model).to(training.ranks.device)
    groups = model.parameter_groups(
        settings.learning_rate, settings.embedding_learning_rate, settings.weight_decay
    )
    for group in groups:
        group["initial_lr"] = group["lr"]
    # Fused: a third of the time of the default on a CPU, where the embeddings are most of it.
    return model, AdamW(groups, betas=(0.9, 0.99), fused=True)


def falling(schedule: str, share: float) -> float:
    """Return what is left of a learning rate after `share` of all steps: from 1 down to 0."""
    return 1 - share if schedule == "linear" else (1 + math.cos(math.pi * share)) / 2


def seed_of(*parts: int) -> int:
    """Return a seed of 63 bits that depends on each part and on their order."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _batches(training: Training, progress: Progress) -> Iterator[Batch]:
    ranks = training.ranks
    return training.dataset.batches(
        "train",
        _samples_per_batch(training),
        training.settings.model.history_limit,
        shuffle_seed=seed_of(training.settings.seed, progress.epoch),
        rank=ranks.rank,
        world_size=ranks.size,
        start=progress.batch,
    )


def _samples_per_batch(training: Training) -> int:
    return max(1, training.settings.optimiser.samples_per_batch // training.ranks.size)


def _forward(model: ClickModel, ranks: Ranks) -> nn.Module:
    """Return what computes the model in training, with its parameters."""
    forward = compiled(model) if ranks.device.type == "cuda" else model
    if ranks.size == 1:
        return forward
    # An encoder may leave embeddings unused; buffers are planes, drawn alike from the seed.
    return DistributedDataParallel(forward, broadcast_buffers=False, find_unused_parameters=True)


def _close_epoch(training: Training, model: ClickModel, progress: Progress) -> Progress:
    """Measure the epoch on validation; every worker comes to the same progress."""
    begun = time.perf_counter()
    settings, ranks = training.settings.optimiser, training.ranks
    found = predict(model, training.dataset, "validation", settings, ranks)
    epoch = Epoch(
        number=progress.epoch + 1,
        loss=progress.loss / progress.samples,
        seconds=progress.seconds,
        samples_per_s=progress.samples / progress.seconds,
        validation=found.metrics() if found else {},
    )
    epoch = ranks.share(epoch)
    seconds = progress.total_seconds + time.perf_counter() - begun
    return replace(progress.with_epoch(epoch, model), total_seconds=seconds)


def _save(training: Training, progress: Progress, model: ClickModel, optimiser: Optimizer) -> None:
    if training.ranks.first:
        checkpoints.save(training.checkpoint, training.identity, progress, model, optimiser)
