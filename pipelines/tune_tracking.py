"""A tuning in MLflow: one run for the whole, one nested in it for each trial."""

import time
from collections.abc import Mapping
from typing import Any

from hashtab.pipelines.command_line import SettingsError, flatten
from hashtab.pipelines.tracking import TrackedRun, Tracking, said_in_one_line
from hashtab.pipelines.tuning import Trial, Tuning

_SOURCE = {"mlflow.source.name": "pipelines/tune.py"}


class TuneTracking(Tracking):
    """A connection to MLflow that knows tunings and trials beside trainings."""

    def begin_tuning(self, tuning: Tuning, data_digest: str) -> TrackedRun:
        """Begin the MLflow run of a tuning, or go on in it if this store has it.

        Raises:
            SettingsError: if the store cannot be used.
        """
        from mlflow.entities import Param

        tracked = self.begin(tuning, data_digest)
        chosen = {
            "trials": tuning.chosen.trials,
            **{f"space.{name}": values for name, values in flatten(tuning.chosen.space).items()},
        }
        params = [Param(name, str(value)) for name, value in chosen.items()]
        with said_in_one_line(self.uri):
            self._client.log_batch(tracked.run_id, params=params, tags=_tags(_SOURCE))
        return tracked

    def begin_trial(self, trial: Trial, tuning_id: str, data_digest: str) -> TrackedRun:
        """Begin the MLflow run of a trial within that of its tuning, or go on in it.

        Raises:
            SettingsError: if the store cannot be used.
        """
        tracked = self.begin(trial.run, data_digest)
        tags = _tags(_SOURCE | {"mlflow.parentRunId": tuning_id, "state": "running"})
        try:
            with said_in_one_line(self.uri):
                self._client.log_batch(tracked.run_id, tags=tags)
        except SettingsError:
            tracked.stop()  # nobody knows of it who could
            raise
        return tracked

    def end_trial(self, trial: Trial, tracked: TrackedRun) -> None:
        """Log what a trial with a result came to, and end its run well.

        Raises:
            SettingsError: if the store cannot be used.
        """
        result = trial.run.result
        tracked.log_epochs(list(result.epochs))  # those told to a killed driver may be missing
        metrics = {
            **{f"best/validation/{name}": value for name, value in trial.best.validation.items()},
            "best/epoch": result.best_epoch,
            "seconds": result.seconds,
        }
        self._log(tracked, metrics, result.best_epoch, {"state": trial.state})
        tracked.end("FINISHED")

    def fail_trial(self, tracked: TrackedRun, failure: str) -> None:
        """End the run of a trial that failed.

        Raises:
            SettingsError: if the store cannot be used.
        """
        self._log(tracked, {}, 0, {"state": "failed", "failure": failure})
        tracked.end("FAILED")

    def end_tuning(self, tuning: Tuning, tracked: TrackedRun) -> None:
        """Log the best trial, its settings and the plots, and end the run well.

        Raises:
            SettingsError: if the store cannot be used.
        """
        best = tuning.ranking[0]
        metrics = {f"best/validation/{name}": value for name, value in best.best.validation.items()}
        tags = {"best_trial": best.name}
        self._log(tracked, metrics, 0, tags)
        with said_in_one_line(self.uri):
            self._client.log_artifact(tracked.run_id, str(tuning.best_settings))
            self._client.log_artifacts(tracked.run_id, str(tuning.plots), tuning.plots.name)
        tracked.end("FINISHED")

    def _log(
        self, tracked: TrackedRun, metrics: Mapping[str, float], step: int, tags: Mapping[str, str]
    ) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(name, value, now, step) for name, value in metrics.items()]
        with said_in_one_line(self.uri):
            self._client.log_batch(tracked.run_id, metrics=entities, tags=_tags(tags))


def _tags(tags: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(name, value) for name, value in tags.items()]
