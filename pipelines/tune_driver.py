"""The driver of a tuning: runs its trials, shows and tracks them, and keeps what they came to."""

import sys
from functools import partial
from typing import Self

from tqdm import tqdm

from hashtab.features.manifest import Manifest
from hashtab.pipelines.checkpoints import Epoch
from hashtab.pipelines.tracking import Telling, TrackedRun
from hashtab.pipelines.tune_plots import plot_tuning
from hashtab.pipelines.tune_tracking import TuneTracking
from hashtab.pipelines.tuning import Trial, Tuning


def run_tuning(tuning: Tuning, manifest: Manifest, tracking: TuneTracking) -> dict[str, str]:
    """Bring a tuning to its end on the cluster that is there; trials with a result cost nothing.

    Returns:
        Name of a trial that failed -> why.

    Raises:
        SettingsError: if another process is at it, or MLflow cannot be used.
        TuningError: if all trials failed.
    """
    with tuning.locked():
        tuning.begin(manifest)
        with Followed(tuning, manifest, tracking) as followed:
            if not tuning.tried:
                from hashtab.pipelines import ray_tuning  # slow to import, as Ray is

                ray_tuning.fit(tuning, tuning.trials, followed)
            followed.conclude()
    return followed.failures


class Followed:
    """A tuning while it goes on: its trials shown to the user, logged to MLflow and stored.

    A tracking server that is lost meanwhile stops no trial: MLflow learns all by `--resume`.

    Args:
        tuning: that goes on.
        manifest: of its data.
        tracking: where to track it.

    Attributes:
        failures: name of a trial -> why it failed.
    """

    def __init__(self, tuning: Tuning, manifest: Manifest, tracking: TuneTracking) -> None:
        self.failures: dict[str, str] = {}
        self._tuning = tuning
        self._manifest = manifest
        self._tracking = tracking
        self._trials = {trial.name: trial for trial in tuning.trials}
        self._epochs: dict[str, dict[int, Epoch]] = {}
        self._seconds: dict[str, float] = {}
        self._tracked: dict[str, TrackedRun] = {}
        self._told = Telling(tuning.name)

    def __enter__(self) -> Self:
        self._whole = self._tracking.begin_tuning(self._tuning, self._manifest.digest)
        self._bar = tqdm(
            desc=self._tuning.name,
            total=len(self._trials),
            unit="trial",
            leave=False,
            disable=not sys.stderr.isatty(),
        )
        for trial in self._trials.values():
            if trial.run.finished:
                # Which a driver that was killed may have left out.
                self._told(partial(self._publish, trial))
                self._bar.update()
        return self

    def begin(self, name: str) -> None:
        """Begin a trial or go on with it."""
        trial = self._trials[name]
        goes_on = trial.run.checkpoint.exists()
        trial.run.begin(self._manifest)
        self._told(partial(self._track, trial))
        values = ", ".join(f"{key} {value}" for key, value in trial.values.items())
        self._say(trial, f"{'goes on from its checkpoint' if goes_on else 'begins'}: {values}")

    def add_epoch(self, name: str, epoch: Epoch, seconds: float) -> None:
        """Show and log an epoch, once however often it is told."""
        trial, known = self._trials[name], self._epochs.setdefault(name, {})
        self._seconds[name] = seconds
        if epoch.number in known:
            return
        known[epoch.number] = epoch
        self._told(lambda: self._track(trial).log_epochs([epoch]))
        epochs = trial.run.settings.optimiser.epochs
        self._say(
            trial,
            f"epoch {epoch.number} of {epochs}: loss {epoch.loss:.4f}, "
            f"validation gAUC {epoch.gauc:.4f}, {epoch.seconds:.0f} s",
        )

    def end(self, name: str, failure: str | None) -> None:
        """Keep what a trial came to."""
        trial = self._trials[name]
        if failure is None:
            epochs = [epoch for _, epoch in sorted(self._epochs[name].items())]
            trial.finish(epochs, self._seconds[name])
            self._say(trial, f"{trial.state}, best validation gAUC {trial.best.gauc:.4f}")
            self._told(partial(self._publish, trial))
            if name in self._tracked:
                self._tracked.pop(name).stop()
        else:
            self.failures[name] = failure
            self._told(lambda: self._tracking.fail_trial(self._track(trial), failure))
            self._tracked.pop(name, None)
            self._say(trial, f"failed: {failure}")
        self._bar.update()

    def conclude(self) -> None:
        """Write the best settings, draw the plots, and log both.

        Raises:
            TuningError: if all trials failed.
        """
        self._tuning.conclude(self.failures)
        plot_tuning(self._tuning.ranking, self._tuning.plots)
        self._told(self._publish_tuning)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        self._whole.stop()
        if kind is not None:
            for tracked in (*self._tracked.values(), self._whole):
                status = "KILLED" if kind is KeyboardInterrupt else "FAILED"
                self._told(partial(tracked.end, status))

    def _track(self, trial: Trial) -> TrackedRun:
        if trial.name not in self._tracked:
            self._tracked[trial.name] = self._tracking.begin_trial(
                trial, self._whole.run_id, self._manifest.digest
            )
        return self._tracked[trial.name]

    def _publish(self, trial: Trial) -> None:
        if not trial.run.published:
            self._tracking.end_trial(trial, self._track(trial))
            trial.run.publish()
        self._tracked.pop(trial.name, None)

    def _publish_tuning(self) -> None:
        self._tracking.end_tuning(self._tuning, self._whole)
        if not self.failures:
            self._tuning.publish()

    def _say(self, trial: Trial, text: str) -> None:
        tqdm.write(f"{trial.name} of {len(self._trials)}  {text}", file=sys.stderr)
