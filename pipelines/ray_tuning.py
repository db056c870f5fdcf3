"""Trials on Ray Tune: what each one does, which are stopped, and how the driver hears of them.

Tune chooses who runs and who is stopped; what was tried and found lies in the tuning's own folder,
as with a training. So a tuning is resumed from plain files and not from Tune's pickles, which hold
neither the results of the last seconds nor what the scheduler knew.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import shorten
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from hashtab.features.dataset import Dataset
from hashtab.features.plain import build
from hashtab.pipelines.checkpoints import Epoch, Progress
from hashtab.pipelines.ranks import Ranks
from hashtab.pipelines.runs import Run
from hashtab.pipelines.training import Training, train
from hashtab.pipelines.tuning import Trial, Tuning, gauc

_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Its own would swallow Ctrl-C and end the tuning as if it were done.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
# Of the trials that come to a rung, one in so many goes on; rungs are the epochs 1, 2, 4, 8 ...
_REDUCTION = 2
_MAX_LOST_PROCESSES = 3
_LONGEST_REASON = 500  # characters


class Listener(Protocol):
    """Whoever is told how the trials go, by their names."""

    def begin(self, name: str) -> None:
        """A trial begins or goes on."""

    def add_epoch(self, name: str, epoch: Epoch, seconds: float) -> None:
        """A trial has come to the end of an epoch, `seconds` after its beginning."""

    def end(self, name: str, failure: str | None) -> None:
        """A trial has come to its end, was stopped, or failed for a reason."""


def fit(tuning: Tuning, trials: Sequence[Trial], listener: Listener) -> None:
    """Run the trials that have no result yet, as many at a time as the tuning's settings say.

    Args:
        tuning: that they belong to.
        trials: all of them, those with a result included.
        listener: told of each trial's beginning, epochs and end, in this thread.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    runs = {trial.name: trial.run for trial in trials if not trial.run.finished}
    scratch = tuning.folder / "ray"
    trainable = tune.with_resources(tune.with_parameters(_train_trial, runs=runs), {"cpu": 1})
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(runs))},
        tune_config=tune.TuneConfig(
            scheduler=_scheduler(tuning, trials), max_concurrent_trials=tuning.chosen.workers
        ),
        run_config=tune.RunConfig(
            name=scratch.name,
            storage_path=str(tuning.folder),
            callbacks=[_Teller(listener)],
            failure_config=tune.FailureConfig(max_failures=_MAX_LOST_PROCESSES),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scheduler(tuning: Tuning, trials: Sequence[Trial]) -> ASHAScheduler:
    """Make the scheduler, which knows the trials of a tuning that was stopped."""
    scheduler = ASHAScheduler(
        time_attr="epoch",
        metric="gauc",
        mode="max",
        max_t=tuning.settings.optimiser.epochs,
        grace_period=1,
        reduction_factor=_REDUCTION,
    )
    for trial in trials:
        if trial.run.finished:
            known = SimpleNamespace(trial_id=trial.name)
            scheduler.on_trial_add(None, known)
            for epoch in trial.run.result.epochs:
                scheduler.on_trial_result(None, known, _rung(epoch))
    return scheduler


def _rung(epoch: Epoch) -> dict[str, Any]:
    return {"epoch": epoch.number, "gauc": gauc(epoch)}


def _train_trial(config: dict[str, Any], runs: Mapping[str, Run]) -> None:
    """Train one trial from its beginning or its checkpoint, in a process of its own."""
    run = runs[config["trial"]]
    torch.set_num_threads(run.settings.threads)

    def listen(event: str, progress: Progress) -> None:
        if event == "step":
            return
        # A trial that goes on tells of its first epochs again: this scheduler has not heard them.
        for epoch in progress.epochs if event == "start" else progress.epochs[-1:]:
            tune.report(_rung(epoch) | {"record": asdict(epoch), "seconds": progress.total_seconds})

    try:
        dataset = Dataset.open(run.settings.data)
        train(Training(run.settings, dataset, run.checkpoint, Ranks()), listen)
    except Exception as error:
        # Told and not raised: it would come again, and only a lost process is worth another try.
        tune.report({"epoch": 0, "gauc": 0.0, "failure": _one_line(error)})


def _one_line(error: BaseException) -> str:
    return shorten(f"{type(error).__name__}: {error}", _LONGEST_REASON)


class _Teller(tune.Callback):  # type: ignore[misc]  # ray has no types here
    """Hands on what Tune's loop hears."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._failures: dict[str, str] = {}
        self._ended: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks into a file that is never read here."""
        return {}

    def on_trial_start(self, *, trial: Any, **_: Any) -> None:
        self._listener.begin(trial.config["trial"])

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        name = trial.config["trial"]
        if "failure" in result:
            self._failures[name] = result["failure"]
        else:
            epoch = build(Epoch, result["record"], "epoch")
            self._listener.add_epoch(name, epoch, result["seconds"])

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:
        self._ended.append(trial.config["trial"])

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        name = trial.config["trial"]
        # Tune has no reason at hand here; Ray prints the one that it knows to the terminal.
        self._failures[name] = (
            f"its process was lost {1 + _MAX_LOST_PROCESSES} times; "
            "if memory is short, fewer --workers need less"
        )
        self._ended.append(name)

    def on_step_end(self, **_: Any) -> None:
        # Not in on_trial_complete, where Tune would take an error of ours for one of the trial.
        while self._ended:
            name = self._ended.pop(0)
            self._listener.end(name, self._failures.get(name))
