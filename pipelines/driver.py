"""The driver of trainings: starts workers, follows them, tracks them, and says what came out."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Self

from hashtab.features.manifest import Manifest
from hashtab.features.plain import build
from hashtab.pipelines import ray_training
from hashtab.pipelines.checkpoints import Epoch
from hashtab.pipelines.events import Tail
from hashtab.pipelines.plots import plot_run
from hashtab.pipelines.progress import ProgressBar
from hashtab.pipelines.runs import Run
from hashtab.pipelines.tracking import TrackedRun, Tracking

_POLL_S = 0.2


def train_runs(
    runs: Sequence[Run], manifest: Manifest, tracking: Tracking, *, apart: bool = False
) -> None:
    """Train runs on the cluster that is there, to their ends; finished ones cost nothing.

    Args:
        runs: with settings alike in all that says where they run.
        manifest: of their data.
        tracking: where to track them.
        apart: each worker trains whole runs by itself, in place of all sharing each.

    Raises:
        SettingsError: if another process is training one of them.
        ray.train.TrainingFailedError: if a worker raised, or was lost too often.
    """
    waiting = [run for run in runs if not run.finished]
    if not waiting:
        return
    with ExitStack() as stack:
        for run in waiting:
            stack.enter_context(run.locked())
            run.begin(manifest)
        tails = [Tail(run.log) for run in waiting]
        fitting = _Background(lambda: ray_training.fit(waiting, apart=apart))
        followed = [
            stack.enter_context(Followed(run, tracking.begin(run, manifest.digest), tail, place))
            for place, (run, tail) in enumerate(zip(waiting, tails, strict=True))
        ]
        running = True
        while running:
            running = fitting.running()  # asked first: what is written before the end is read
            for one in followed:
                one.follow()
            time.sleep(_POLL_S if running else 0)
        fitting.join()


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
        tracked: its MLflow run.
        tail: of its events.
        place: of its progress bar among several.
    """

    def __init__(self, run: Run, tracked: TrackedRun, tail: Tail, place: int) -> None:
        self._run = run
        self._tracked = tracked
        self._tail = tail
        self._bar = ProgressBar(run.name, place)
        self._open = True

    def follow(self) -> None:
        """Take up what has happened since the last call."""
        for event in self._tail.read():
            epochs = [build(Epoch, epoch, "epoch") for epoch in event.get("epochs", ())]
            self._bar.show(event, epochs)
            self._tracked.log_epochs(epochs)
        if self._open and self._run.finished:
            result = self._run.result
            plot_run(result, self._run.plots)
            self._tracked.log_result(self._run, result)
            self._close()

    def _close(self) -> None:
        self._open = False
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._open:
            self._tracked.end("KILLED" if kind is KeyboardInterrupt else "FAILED")
            self._close()
