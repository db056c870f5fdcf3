"""One MLflow run for one training, written by the driver alone, however often it is resumed."""

import logging
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hashtab.pipelines.checkpoints import Epoch
from hashtab.pipelines.cluster import ROOT
from hashtab.pipelines.command_line import SettingsError, flatten
from hashtab.pipelines.runs import Result, Run

if TYPE_CHECKING:
    from mlflow import MlflowClient

_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}
_SYSTEM_METRICS_S = 5
# Steps of this metric tell which epochs a resumed run has already logged.
_EPOCH_METRIC = "train/loss"


class Tracking:
    """A connection to MLflow.

    Args:
        uri: of the tracking store or server.
        experiment: that runs belong to; made if it is not there.

    Raises:
        SettingsError: if the store cannot be used.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        import mlflow  # slow to import: --help and bad settings need not wait for it

        self.uri = uri
        self._client: MlflowClient = mlflow.MlflowClient(tracking_uri=uri)
        try:
            found = self._client.get_experiment_by_name(experiment)
            self._experiment_id: str = (
                found.experiment_id if found else self._client.create_experiment(experiment)
            )
        except mlflow.exceptions.MlflowException as error:
            raise SettingsError(f"MLflow cannot use {uri}: {error}") from error

    def begin(self, run: Run, data_digest: str) -> "TrackedRun":
        """Begin the MLflow run of a training, or go on in it."""
        run_id = run.tracked_as
        if run_id is None:
            created = self._client.create_run(self._experiment_id, run_name=run.name)
            run_id = created.info.run_id
            run.track_as(run_id)
            self._client.log_batch(run_id, params=_params(run, data_digest), tags=_tags())
        self._client.update_run(run_id, status="RUNNING")
        return TrackedRun(self._client, self.uri, run_id)

    def add_artifacts(self, run: Run, folder: Path) -> None:
        """Add a folder to a training's run, also after its end."""
        if run.tracked_as is not None:
            self._client.log_artifacts(run.tracked_as, str(folder), folder.name)


class TrackedRun:
    """The MLflow run of one training while it goes on.

    Args:
        client: of MLflow.
        uri: of the tracking store.
        run_id: of the run.
    """

    def __init__(self, client: "MlflowClient", uri: str, run_id: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.run_id = run_id
        self._client = client
        history = client.get_metric_history(run_id, _EPOCH_METRIC)
        self._logged = {metric.step for metric in history}
        self._monitor = SystemMetricsMonitor(
            run_id, _SYSTEM_METRICS_S, resume_logging=True, tracking_uri=uri
        )
        self._monitor.start()

    def log_epochs(self, epochs: list[Epoch]) -> None:
        """Log the epochs that are not there yet, each at its number as step."""
        for epoch in epochs:
            if epoch.number not in self._logged:
                values = {
                    "train/loss": epoch.loss,
                    "train/samples_per_s": epoch.samples_per_s,
                    "train/seconds": epoch.seconds,
                    **{f"validation/{name}": value for name, value in epoch.validation.items()},
                }
                self._log(values, epoch.number)
                self._logged.add(epoch.number)

    def log_result(self, run: Run, result: Result) -> None:
        """Log final metrics, plots and the model, and end the run well."""
        values = {
            f"best/{split}/{name}": value
            for split, metrics in result.metrics.items()
            for name, value in metrics.items()
        }
        extra = {"best/epoch": result.best_epoch, "parameters": result.parameters}
        self._log(values | extra | {"seconds": result.seconds}, result.best_epoch)
        for folder in (run.plots, run.model):
            self._client.log_artifacts(self.run_id, str(folder), folder.name)
        self.end("FINISHED")

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._monitor.finish()
        self._client.set_terminated(self.run_id, status)

    def _log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)


def _params(run: Run, data_digest: str) -> list[Any]:
    from mlflow.entities import Param

    flat = {**flatten(run.settings), "data_digest": data_digest}
    return [Param(name, str(value)) for name, value in flat.items() if name != "resume"]


@dataclass(frozen=True)
class Commit:
    """The state of the source: its commit, and whether files differ from it."""

    sha: str
    dirty: bool


def source_commit(root: Path) -> Commit | None:
    """Return the git commit of a checkout; None outside of one or without git."""
    try:
        sha = _git(root, "rev-parse", "HEAD")
        return Commit(sha, bool(_git(root, "status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _tags() -> list[Any]:
    from mlflow.entities import RunTag

    tags = {"mlflow.source.name": "pipelines/train_sdim.py", "mlflow.source.type": "LOCAL"}
    commit = source_commit(ROOT)
    if commit:
        tags |= {"mlflow.source.git.commit": commit.sha, "git.dirty": str(commit.dirty).lower()}
    return [RunTag(name, value) for name, value in tags.items()]
