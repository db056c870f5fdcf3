"""The run of a training on a table: its settings, its folder, and what came out."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from hashtab.features.plain import build
from hashtab.models.tabular.settings import NetworkSettings, TrainingSettings
from hashtab.pipelines.command_line import SettingsError, flatten
from hashtab.pipelines.places import DEFAULT_TRACKING
from hashtab.pipelines.run_folder import RunFolder
from hashtab.pipelines.table_data import TableData, TableSettings


@dataclass(frozen=True, kw_only=True)
class TableTrainSettings:
    """Settings of one training on a table.

    `data`, `network`, `training` and `seed` decide the result; the rest says where and how it runs.

    Args:
        data: the table, and what is to be predicted.
        network: what the network is made of.
        training: how it is trained.
        seed: of the rows held out, initial weights, the order of rows and dropout.
        threads: cores used; small tables are trained no faster by more.
        storage: folder of all runs.
        run_name: name of the run and its folder; made of the target and a digest of data and
            settings by default.
        resume: show the result of a finished run, or train one again that was stopped.
        register: name of the registered model that the bundle becomes the challenger of; none by
            default.
        tracking_uri: of MLflow.
        experiment: of MLflow.
    """

    data: TableSettings = field(default_factory=TableSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    seed: int = 0
    threads: int = 1
    storage: str = "runs"
    run_name: str | None = None
    resume: bool = False
    register: str | None = None
    tracking_uri: str = DEFAULT_TRACKING
    experiment: str = "hashtab"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise SettingsError(f"seed must not be negative, got {self.seed}")
        if self.threads < 1:
            raise SettingsError(f"threads must be positive, got {self.threads}")
        chosen = self.run_name
        if chosen is not None and (chosen in ("", "..") or Path(chosen).name != chosen):
            raise SettingsError(f"run_name must be the name of a folder, got {chosen!r}")


def table_identity(settings: TableTrainSettings, data: TableData) -> dict[str, Any]:
    """Return what decides the result of a training, flat and as plain data."""
    parts = {name: flatten(getattr(settings, name)) for name in ("network", "training")}
    plain = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
    return {**plain, "seed": settings.seed, "data digest": data.digest}


def named_by_digest(kind: str, target: str, identity: Mapping[str, Any]) -> str:
    """Return a name for a person and for a machine: kind, target, and a digest of an identity."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    words = "".join(letter if letter.isalnum() else "-" for letter in target.lower())
    return f"{kind}-{words[:32]}-{digest}"


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """What a finished training on a table came to.

    Args:
        name: of the run.
        metrics: split -> metric -> value.
        curves: of each epoch, name -> value, as the estimator tells them.
        importances: column -> how much worse the test loss is with its values shuffled.
        rows: split -> number of its rows.
        columns: that the model reads.
        seconds: of fitting.
    """

    name: str
    metrics: dict[str, dict[str, float]]
    curves: tuple[dict[str, float], ...]
    importances: dict[str, float]
    rows: dict[str, int]
    columns: int
    seconds: float


@dataclass(frozen=True)
class TableRun(RunFolder):
    """One training's folder and settings.

    Args:
        folder: absolute, named as the run.
        settings: of the training.
    """

    script: ClassVar[str] = "pipelines/train_tabnsa.py"

    settings: TableTrainSettings

    @classmethod
    def find(cls, settings: TableTrainSettings, data: TableData) -> Self:
        """Return the run of these settings and data, whether it was begun or not.

        Raises:
            SettingsError: if its folder holds a training of other settings or data.
        """
        identity = table_identity(settings, data)
        name = settings.run_name or named_by_digest("tabnsa", str(settings.data.target), identity)
        storage = Path(settings.storage).resolve()
        run = cls(storage / name, replace(settings, storage=str(storage)))
        run.refuse_another(identity)
        return run

    @property
    def bundle(self) -> Path:
        """Folder of the bundle."""
        return self.folder / "bundle"

    @property
    def held_out(self) -> Path:
        """The rows tested on, with their target."""
        return self.folder / "test.parquet"

    @property
    def result(self) -> TableResult:
        """What a finished training came to."""
        result: TableResult = build(TableResult, self.read_result(), "result")
        return result

    def finish(self, result: TableResult) -> None:
        """Store the result; the run is finished from then on."""
        self.write_result(asdict(result))
