"""One MLflow run for one training, written by the driver alone, however often it is resumed."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hashtab.pipelines.checkpoints import Epoch
from hashtab.pipelines.cluster import ROOT
from hashtab.pipelines.command_line import SettingsError, flatten
from hashtab.pipelines.run_folder import RunFolder
from hashtab.pipelines.runs import Result, Run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}
_RETRIES = "3"  # of a call: by default MLflow waits four minutes for a server that is away
_SILENCE_S = 60.0
_SYSTEM_METRICS_S = 5
# Steps of this metric tell which epochs a resumed run has already logged.
_EPOCH_METRIC = "train/loss"
_MOST_AT_ONCE = 1000  # metrics that MLflow takes in one batch
_ACTIVE = "active"  # and not deleted, which can be undone


class Tracking:
    """A connection to MLflow.

    Args:
        uri: of the tracking store or server.
        experiment: that runs belong to; made if it is not there.

    Raises:
        SettingsError: if the store cannot be used, or the experiment was deleted in it.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        with said_in_one_line(uri):
            self._client = connect(uri)
            found = self._client.get_experiment_by_name(experiment)
            self._experiment_id: str = (
                found.experiment_id if found else self._client.create_experiment(experiment)
            )
        if found and found.lifecycle_stage != _ACTIVE:
            raise SettingsError(
                f"the MLflow experiment {experiment!r} (id {found.experiment_id}) is deleted in "
                f"{uri}: restore it, or choose another --experiment or --tracking_uri"
            )

    def begin(self, run: RunFolder, data_digest: str) -> "TrackedRun":
        """Begin the MLflow run of a training, or go on in it if this store has it.

        Raises:
            SettingsError: if the store cannot be used.
        """
        with said_in_one_line(self.uri):
            tracked = self._find(run) or self._client.create_run(
                self._experiment_id, run_name=run.name
            )
            run_id: str = tracked.info.run_id
            run.track_as(run_id, self.uri)
            # A parameter cannot change: of a resume with more workers, the first number stays.
            known = {*tracked.data.params, *tracked.data.tags}
            params = [param for param in _params(run, data_digest) if param.key not in known]
            tags = [tag for tag in _tags(run.script) if tag.key not in known]
            self._client.log_batch(run_id, params=params, tags=tags)
            self._client.update_run(run_id, status="RUNNING")
            return TrackedRun(self._client, self.uri, run_id)

    def add_artifacts(self, run: RunFolder, folder: Path, name: str) -> None:
        """Add a folder under a name to a training's run, also after its end, if it is here."""
        with said_in_one_line(self.uri):
            if self._find(run):
                self._client.log_artifacts(run.tracked_as, str(folder), name)

    def _find(self, run: RunFolder) -> "MlflowRun | None":
        """Return the MLflow run that a training has in this store; one in the bin is none."""
        from mlflow.exceptions import MlflowException

        if run.tracked_as is None:
            return None
        try:
            found = self._client.get_run(run.tracked_as)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return found if found.info.lifecycle_stage == _ACTIVE else None


def connect(uri: str) -> "MlflowClient":
    """Return a client of MLflow that says nothing of its own accord."""
    _quieten()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _RETRIES)
    import mlflow  # slow to import: --help and bad settings need not wait for it

    return mlflow.MlflowClient(tracking_uri=uri)


def _quieten() -> None:
    """Tell MLflow to say nothing of its own accord; it listens when it is imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)


@contextmanager
def said_in_one_line(uri: str) -> Iterator[None]:
    """Turn what MLflow and its drivers raise into a `SettingsError` that names the store."""
    _quieten()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError, ImportError) as error:
        raise SettingsError(f"MLflow cannot use {uri}: {' '.join(str(error).split())}") from error


class Telling:
    """Tells MLflow what happens; once it is lost, tries again after a minute at the earliest.

    Args:
        name: of the work that does not stop when MLflow is lost.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lost = False
        self._silent_until = 0.0

    def __call__(self, tell: Callable[[], object]) -> None:
        """Tell MLflow, or say once that it cannot be told now."""
        if time.monotonic() < self._silent_until:
            return  # each try would hold up what goes on
        try:
            tell()
        except SettingsError as error:
            self._silent_until = time.monotonic() + _SILENCE_S
            if not self._lost:
                self._lost = True
                print(
                    f"{error}; {self._name} goes on without it. When MLflow is back, the same "
                    "command with --resume tells it all",
                    file=sys.stderr,
                )


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
        self._uri = uri
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
        final = values | extra | {"seconds": result.seconds}
        self.finish(final, result.best_epoch, (run.plots, run.model))

    def finish(self, metrics: dict[str, float], step: int, paths: Iterable[Path]) -> None:
        """Log final metrics, and files and folders as artifacts, and end the run well."""
        self._log(metrics, step)
        with said_in_one_line(self._uri):
            for path in paths:
                if path.is_dir():
                    self._client.log_artifacts(self.run_id, str(path), path.name)
                else:
                    self._client.log_artifact(self.run_id, str(path))
        self.end("FINISHED")

    def add_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags to the run."""
        from mlflow.entities import RunTag

        with said_in_one_line(self._uri):
            entities = [RunTag(name, value) for name, value in tags.items()]
            self._client.log_batch(self.run_id, tags=entities)

    def add_params(self, params: Mapping[str, Any]) -> None:
        """Add parameters to the run; those that it has must be the same."""
        from mlflow.entities import Param

        with said_in_one_line(self._uri):
            entities = [Param(name, str(value)) for name, value in params.items()]
            self._client.log_batch(self.run_id, params=entities)

    def log_curves(self, curves: Sequence[Mapping[str, float]]) -> None:
        """Log curves in one go: a mapping of names to values for each epoch, from the first."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, step)
            for step, values in enumerate(curves, start=1)
            for name, value in values.items()
        ]
        with said_in_one_line(self._uri):
            for start in range(0, len(metrics), _MOST_AT_ONCE):
                self._client.log_batch(self.run_id, metrics[start : start + _MOST_AT_ONCE])

    def stop(self) -> None:
        """Stop watching the machine; the run itself stays as it is."""
        self._monitor.finish()

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self.stop()
        with said_in_one_line(self._uri):
            self._client.set_terminated(self.run_id, status)

    def _log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        with said_in_one_line(self._uri):
            self._client.log_batch(self.run_id, metrics=metrics)


def _params(run: RunFolder, data_digest: str) -> list[Any]:
    from mlflow.entities import Param

    flat = {**flatten(run.settings), "data_digest": data_digest}
    return [Param(name, str(value)) for name, value in flat.items() if name != "resume"]


@dataclass(frozen=True)
class Commit:
    """The state of the source: its commit, and whether files differ from it, if that is known."""

    sha: str
    dirty: bool | None


def source_commit(root: Path) -> Commit | None:
    """Return the git commit of a checkout, or else the one that GIT_COMMIT names, if any.

    Ray sends a working directory to its cluster without `.git`.
    """
    if not (root / ".git").exists():
        told = os.environ.get("GIT_COMMIT")
        return Commit(told, dirty=None) if told else None
    try:
        sha = _git(root, "rev-parse", "HEAD")
        return Commit(sha, bool(_git(root, "status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _tags(script: str) -> list[Any]:
    from mlflow.entities import RunTag

    tags = {"mlflow.source.name": script, "mlflow.source.type": "LOCAL"}
    commit = source_commit(ROOT)
    if commit:
        tags["mlflow.source.git.commit"] = commit.sha
        if commit.dirty is not None:
            tags["git.dirty"] = str(commit.dirty).lower()
    return [RunTag(name, value) for name, value in tags.items()]
