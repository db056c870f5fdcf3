"""The run of a click model's training: its settings, how it goes, and what came out."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from hashtab.features.manifest import Manifest
from hashtab.features.plain import build
from hashtab.pipelines.checkpoints import Epoch
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.run_folder import RunFolder
from hashtab.pipelines.settings import TrainSettings, identity, run_name


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
class Run(RunFolder):
    """One training's folder and settings; both can be sent to workers.

    Args:
        folder: absolute, named as the run.
        settings: of the training, with absolute paths.
    """

    settings: TrainSettings

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return self.folder / "checkpoint.pt"

    @property
    def log(self) -> Path:
        """What the first worker tells the driver, a JSON object a line."""
        return self.folder / "progress.jsonl"

    @property
    def result(self) -> Result:
        """What a finished training came to."""
        result: Result = build(Result, self.read_result(), "result")
        return result

    def finish(self, result: Result) -> None:
        """Store the result; the run is finished from then on."""
        self.write_result(asdict(result))

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
        self.refuse_another(self.identity(manifest))

    def begin(self, manifest: Manifest) -> None:
        """Make the folder of a new run; nothing where it is there."""
        self.make(self.identity(manifest))


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
        record = json.loads((folder / "run.json").read_text())
        return cls(
            metrics=json.loads(path.read_text())["metrics"],
            mlflow_run_id=record["mlflow_run_id"],
            tracking_uri=record.get("tracking_uri"),
        )
