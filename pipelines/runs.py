"""The folder of one run: who it belongs to, how it goes, and what came out."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from hashtab.features.manifest import Manifest
from hashtab.features.plain import build
from hashtab.features.storage import write_text
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
    """

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

    def track_as(self, run_id: str) -> None:
        """Remember the MLflow run, so that a resumed training goes on in it."""
        self._write(self._record() | {"mlflow_run_id": run_id})

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
    def find(cls, settings: TrainSettings, manifest: Manifest) -> Self:
        """Return the run of these settings and data, whether it was begun or not.

        Raises:
            SettingsError: if it was begun and `resume` is not set, if it was not begun and
                `resume` is set, or if the folder holds a training of other settings or data.
        """
        name = run_name(settings, manifest.digest)
        run = cls(Path(settings.storage).resolve() / name, absolute(settings))
        begun = run._owner.exists()
        if settings.resume and not begun:
            raise SettingsError(f"nothing to resume: {run.folder} holds no run of these settings")
        if begun:
            differ = differences(run._record()["identity"], identity(settings, manifest.digest))
            if differ:
                raise SettingsError(
                    f"{run.folder} holds another training: {differ}; "
                    "give its settings and data, or another --run_name"
                )
            if not settings.resume:
                state = "finished" if run.finished else "begun"
                raise SettingsError(
                    f"this training was {state} before, in {run.folder}: add --resume to "
                    f"{'show its result' if run.finished else 'go on with it'}, "
                    "or train anew with another --run_name or --seed"
                )
        return run

    def begin(self, manifest: Manifest) -> None:
        """Make the folder of a new run; nothing where it is there."""
        if not self._owner.exists():
            decisive = identity(self.settings, manifest.digest)
            self._write({"identity": decisive, "mlflow_run_id": None})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the lock ends with it, however it ends.

        Raises:
            SettingsError: if another process is training this run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SettingsError(
                    f"another process is training {self.folder}; wait for it or stop it"
                ) from error
            yield


def absolute(settings: TrainSettings) -> TrainSettings:
    """Return the settings with absolute paths: workers have working directories of their own."""
    return replace(
        settings,
        data=str(Path(settings.data).resolve()),
        storage=str(Path(settings.storage).resolve()),
    )
