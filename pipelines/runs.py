"""The folder of one run: who it belongs to, how it goes, and what came out."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from hashtab.features.manifest import Manifest
from hashtab.features.plain import build
from hashtab.features.storage import TEMPORARY, exclusive, write_text
from hashtab.pipelines.checkpoints import Epoch
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.settings import TrainSettings, differences, identity, run_name


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished training came to.

    Args:
        name: of the run.
        best_epoch: number of the epoch whose weights were kept, by validation gAUC.
        epochs: what each epoch came to.
        metrics: split -> metric -> value, with the best epoch's weights.
        calibration: split -> (mean prediction, share of positives) of equally many samples each.
        parameters: trained numbers of the model.
        seconds: of training and evaluation, over all restarts.
    """

    name: str
    best_epoch: int
    epochs: tuple[Epoch, ...]
    metrics: dict[str, dict[str, float]]
    calibration: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    parameters: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """One training's folder and settings; both can be sent to workers.

    Args:
        folder: absolute, named as the run.
        settings: of the training, with absolute paths.

    Attributes:
        work: what is done in the folder, in a word.
    """

    work: ClassVar[str] = "training"

    folder: Path
    settings: TrainSettings

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return self.folder / "checkpoint.pt"

    @property
    def log(self) -> Path:
        """What the first worker tells the driver, a JSON object a line."""
        return self.folder / "progress.jsonl"

    @property
    def model(self) -> Path:
        """Folder of the trained model."""
        return self.folder / "model"

    @property
    def plots(self) -> Path:
        """Folder of the plots."""
        return self.folder / "plots"

    @property
    def begun(self) -> bool:
        """Whether a training was begun in this folder."""
        return self._owner.exists()

    @property
    def finished(self) -> bool:
        """Whether the training is over."""
        return self._result.exists()

    @property
    def result(self) -> Result:
        """What a finished training came to."""
        result: Result = build(Result, json.loads(self._result.read_text()), "result")
        return result

    def finish(self, result: Result) -> None:
        """Store the result; the run is finished from then on."""
        write_text(self._result, json.dumps(asdict(result), indent=1) + "\n")

    @property
    def tracked_as(self) -> str | None:
        """Id of the MLflow run, once there is one."""
        found: str | None = self._record()["mlflow_run_id"]
        return found

    @property
    def tracked_in(self) -> str:
        """Tracking URI of the store that holds the MLflow run, or is to hold it."""
        return self._record().get("tracking_uri") or self.settings.tracking_uri

    def track_as(self, run_id: str, tracking_uri: str) -> None:
        """Remember the MLflow run and its store, so that a resumed training goes on in it."""
        self._write(self._record() | {"mlflow_run_id": run_id, "tracking_uri": tracking_uri})

    @property
    def published(self) -> bool:
        """Whether the training is over and MLflow knows all of it."""
        return self.begun and bool(self._record()["published"])

    def publish(self) -> None:
        """Remember that MLflow knows all."""
        self._write(self._record() | {"published": True})

    @property
    def _result(self) -> Path:
        return self.folder / "result.json"

    @property
    def _owner(self) -> Path:
        return self.folder / "run.json"

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self._owner.read_text())
        return record

    def _write(self, record: dict[str, Any]) -> None:
        write_text(self._owner, json.dumps(record, indent=1) + "\n")

    @classmethod
    def find_or_resume(cls, settings: TrainSettings, manifest: Manifest) -> Self:
        """Return the run of these settings and data, whether it was begun or not.

        Raises:
            SettingsError: if its folder holds a training of other settings or data.
        """
        name = run_name(settings, manifest.digest)
        run = cls(Path(settings.storage).resolve() / name, absolute(settings))
        run.check_identity(manifest)
        return run

    def identity(self, manifest: Manifest) -> dict[str, Any]:
        """Return what decides the result, flat and as plain data."""
        return identity(self.settings, manifest.digest)

    def check_identity(self, manifest: Manifest) -> None:
        """Refuse a folder in which something else was begun.

        Raises:
            SettingsError: naming what differs.
        """
        if not self.begun:
            return
        differ = differences(self._record()["identity"], self.identity(manifest))
        if differ:
            raise SettingsError(
                f"{self.folder} holds another {self.work}: {differ}; "
                "give its settings and data, or another --run_name"
            )

    def check_resume(self) -> None:
        """Refuse to go on with a run unasked, or to resume what was never begun.

        Raises:
            SettingsError: that tells the choices.
        """
        if self.settings.resume and not self.begun:
            raise SettingsError(f"nothing to resume: there is no {self.folder}")
        if self.begun and not self.settings.resume:
            state, what = ("finished", "show its result") if self.finished else ("begun", "go on")
            raise SettingsError(
                f"this {self.work} was {state} before, in {self.folder}: add --resume to {what}, "
                "or begin anew with another --run_name or --seed"
            )

    def begin(self, manifest: Manifest) -> None:
        """Make the folder of a new run; nothing where it is there."""
        if not self.begun:
            decisive = self.identity(manifest)
            self._write({"identity": decisive, "mlflow_run_id": None, "published": False})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the lock ends with it, however it ends.

        Files that a killed writer left without their names are removed.

        Raises:
            SettingsError: if another process is training this run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(self.folder / ".lock"))
            except BlockingIOError as error:
                raise SettingsError(
                    f"another process is training {self.folder}; wait for it or stop it"
                ) from error
            for stray in self.folder.rglob(TEMPORARY):
                stray.unlink(missing_ok=True)
            yield


def absolute(settings: TrainSettings) -> TrainSettings:
    """Return the settings with absolute paths: workers have working directories of their own."""
    return replace(
        settings,
        data=str(Path(settings.data).resolve()),
        storage=str(Path(settings.storage).resolve()),
    )


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What the folder of a finished training run says of it.

    Args:
        metrics: split -> metric -> value.
        mlflow_run_id: of its MLflow run; None where it was not tracked.
        tracking_uri: of the store that holds the MLflow run.
    """

    metrics: dict[str, dict[str, float]]
    mlflow_run_id: str | None
    tracking_uri: str | None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a run's folder.

        Raises:
            SettingsError: if it holds no finished run.
        """
        path = folder / "result.json"
        if not path.is_file():
            raise SettingsError(f"{folder} holds no finished training run ({path.name} is missing)")
        result: Result = build(Result, json.loads(path.read_text()), "result")
        record = json.loads((folder / "run.json").read_text())
        return cls(
            metrics=result.metrics,
            mlflow_run_id=record["mlflow_run_id"],
            tracking_uri=record.get("tracking_uri"),
        )
