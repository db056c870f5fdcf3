"""The driver of trainings: starts workers, follows them, tracks them, and says what came out."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import Self

from hashtab.features.manifest import Manifest
from hashtab.features.plain import build
from hashtab.pipelines import ray_training
from hashtab.pipelines.checkpoints import Epoch
from hashtab.pipelines.events import Tail
from hashtab.pipelines.plots import plot_run
from hashtab.pipelines.progress import ProgressBar
from hashtab.pipelines.runs import Run
from hashtab.pipelines.tracking import Telling, TrackedRun, Tracking

_POLL_S = 0.2


def train_runs(
    runs: Sequence[Run], manifest: Manifest, tracking: Tracking, *, apart: bool = False
) -> None:
    """Train runs on the cluster that is there, to their ends; published ones cost nothing.

    Args:
        runs: with settings alike in all that says where they run.
        manifest: of their data.
        tracking: where to track them.
        apart: each worker trains whole runs by itself, in place of all sharing each.

    Raises:
        SettingsError: if another process is training one of them, or MLflow cannot be used.
        CheckpointError: if a checkpoint is of another training, or cannot be read or written.
        ray.train.TrainingFailedError: if a worker raised, or was lost too often.
    """
    waiting = [run for run in runs if not run.published]
    if not waiting:
        return
    with ExitStack() as stack:
        for run in waiting:
            stack.enter_context(run.locked())
            run.begin(manifest)
        followed = [
            stack.enter_context(
                Followed(run, Tail(run.log), partial(tracking.begin, run, manifest.digest))
            )
            for run in waiting
        ]
        followed[0].begin()  # so that a store which cannot be used is met before any training
        fitting = _Background(partial(_fit, waiting, apart))
        running = True
        while running:
            running = fitting.running()  # asked first: what is written before the end is read
            for one in followed:
                one.follow()
            time.sleep(_POLL_S if running else 0)
        fitting.join()


def _fit(runs: Sequence[Run], apart: bool) -> None:
    # A driver may have been killed between a training's end and its last entry in MLflow.
    unfinished = [run for run in runs if not run.finished]
    if unfinished:
        ray_training.fit(unfinished, apart=apart)


class _Background:
    """Work in a thread that does not keep the process alive, so that Ctrl-C ends it at once."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._future: Future[None] = Future()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._future.set_result(self._work())
        except BaseException as error:  # raised again in the thread that joins
            self._future.set_exception(error)

    def running(self) -> bool:
        """Whether the work still goes on."""
        return not self._future.done()

    def join(self) -> None:
        """Wait for the end; raise what the work raised."""
        self._future.result()


class Followed:
    """One run while it goes on: its events shown to the user and logged to MLflow.

    Args:
        run: that workers are training.
        tail: of its events.
        begin: begins its MLflow run, or goes on in it; called when the training starts at last.
    """

    def __init__(self, run: Run, tail: Tail, begin: Callable[[], TrackedRun]) -> None:
        self._run = run
        self._tail = tail
        self._begin = begin
        self._bar: ProgressBar | None = None
        self._tracked: TrackedRun | None = None
        self._told = Telling(run.name)

    def begin(self) -> TrackedRun:
        """Begin its MLflow run if that has not begun."""
        self._tracked = self._tracked or self._begin()
        return self._tracked

    def follow(self) -> None:
        """Take up what has happened since the last call.

        A tracking server that is lost meanwhile stops no training: MLflow learns all when it is
        back, at the latest by `--resume`.
        """
        finished = self._run.finished  # asked first: what was told before that is then read
        for event in self._tail.read():
            self._bar = self._bar or ProgressBar(self._run.name)
            epochs = [build(Epoch, epoch, "epoch") for epoch in event.get("epochs", ())]
            self._bar.show(event, epochs)
            self._told(partial(self._log_epochs, epochs))
        if finished and not self._run.published:
            plot_run(self._run.result, self._run.plots)
            self._told(self._publish)
            self._close_bar()

    def _log_epochs(self, epochs: list[Epoch]) -> None:
        self.begin().log_epochs(epochs)

    def _publish(self) -> None:
        tracked = self.begin()
        # Those told to a driver that was killed may be missing.
        tracked.log_epochs(list(self._run.result.epochs))
        tracked.log_result(self._run, self._run.result)
        self._run.publish()
        self._tracked = None

    def _close_bar(self) -> None:
        if self._bar:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._tracked:
            status = "KILLED" if kind is KeyboardInterrupt else "FAILED"
            self._told(partial(self._tracked.end, status))
        self._close_bar()
