"""From a fitted estimator of tables to a bundle: graph, golden batch, gate."""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from hashtab.features.plain import build
from hashtab.features.storage import write_text
from hashtab.models.tabular import TabNSAClassifier, TabNSARegressor
from hashtab.pipelines.bundle_folders import bundle_at, digest_of, versions
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.table_data import TableData, Task, spread
from hashtab.pipelines.table_graph import Estimator, table_graph
from hashtab.pipelines.table_parity import check_parity
from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import FORMAT, GOLDEN, TABLE
from hashtab.serving.table_bundle import TableBundle, TableGolden
from hashtab.serving.table_columns import matrices
from hashtab.serving.table_manifest import GRAPH, Column, TableManifest, TableParity, Values

ESTIMATORS: dict[Task, Any] = {
    "classification": TabNSAClassifier,
    "regression": TabNSARegressor,
}
MEANING, SAMPLE, ESTIMATOR = "table.json", "sample.parquet", "estimator"
_SAMPLE_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a saved estimator does not say of itself.

    Args:
        task: what it predicts.
        target: name of the column that it predicts.
        labels: what the target held.
        quantiles: of the target that it predicts; none for its mean, or classes.
        columns: that it reads.
        data_digest: of what it was trained on.
    """

    task: Task
    target: str
    labels: Values
    quantiles: tuple[float, ...] = ()
    columns: tuple[Column, ...]
    data_digest: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the meaning of a saved model.

        Raises:
            SettingsError: if there is none.
        """
        path = folder / MEANING
        if not path.is_file():
            raise SettingsError(
                f"{folder} holds no model of tables ({MEANING} is missing); name the folder of a "
                "finished run"
            )
        meaning: Self = build(cls, json.loads(path.read_text()), MEANING)
        return meaning


def save_estimator(folder: Path, estimator: Estimator, data: TableData, target: str) -> None:
    """Write a fitted estimator, what it means, and rows to check an export with."""
    estimator.save(folder / ESTIMATOR)
    test = data.test.frame  # maybe sorted: its first rows may be all alike
    test[spread(len(test), min(len(test), _SAMPLE_ROWS))].write_parquet(folder / SAMPLE)
    meaning = Meaning(
        task=data.task,
        target=target,
        labels=data.labels,
        quantiles=data.quantiles,
        columns=data.columns,
        data_digest=data.digest,
    )
    write_text(folder / MEANING, json.dumps(asdict(meaning), indent=1) + "\n")


def load_estimator(folder: Path) -> Estimator:
    """Load what `save_estimator` wrote.

    Raises:
        SettingsError: if there is none.
    """
    return ESTIMATORS[Meaning.read(folder).task].load(folder / ESTIMATOR)


def export_table(
    model_folder: Path, target: Path, metrics: dict[str, dict[str, float]]
) -> TableManifest:
    """Write the bundle of a saved estimator; nothing is left where the parity gate refuses it.

    Args:
        model_folder: as `save_estimator` wrote it; the name of the run is that of its parent.
        target: folder of the bundle.
        metrics: of the estimator, split -> metric -> value.

    Returns:
        The manifest; that of a bundle which is there already, if it holds the same model.

    Raises:
        SettingsError: if there is no such model, or the target holds something else.
        BundleError: if torch and onnxruntime disagree.
    """
    Meaning.read(model_folder)
    digest = digest_of(sorted(path for path in model_folder.rglob("*") if path.is_file()))
    build = partial(_build, model_folder=model_folder, model_digest=digest, metrics=metrics)
    return bundle_at(target, TableManifest, digest, build)


def _build(
    folder: Path, *, model_folder: Path, model_digest: str, metrics: dict[str, dict[str, float]]
) -> TableManifest:
    estimator, meaning = load_estimator(model_folder), Meaning.read(model_folder)
    sample = pl.read_parquet(model_folder / SAMPLE)
    classes = tuple(label_text(label) for label in getattr(estimator, "classes_", ()))
    properties = {
        "columns": json.dumps([asdict(column) for column in meaning.columns]),
        "classes": json.dumps(classes),
        "target": meaning.target,
    }
    graph = table_graph(estimator, properties)
    (folder / GRAPH).write_bytes(graph.SerializeToString(deterministic=True))
    draft = TableManifest(
        format=FORMAT,
        kind=TABLE,
        run=model_folder.resolve().parent.name,
        model_digest=model_digest,
        versions=versions(),
        data_digest=meaning.data_digest,
        metrics=metrics,
        files={},
        task=meaning.task,
        target=meaning.target,
        columns=meaning.columns,
        classes=classes,
        labels=meaning.labels,
        quantiles=meaning.quantiles,
        parity=TableParity(rows=0, largest_difference=0.0),
    )
    _check_columns(estimator, meaning.columns)
    bundle = TableBundle(folder, draft)
    parity = check_parity(estimator, bundle, sample)
    inputs = matrices(sample, meaning.columns)
    TableGolden(inputs=inputs, outputs=bundle.run(inputs)).write(folder / GOLDEN)
    return replace(draft, parity=parity).write(folder)


def _check_columns(estimator: Estimator, columns: tuple[Column, ...]) -> None:
    """Refuse columns that the estimator takes for something else than the bundle would."""
    table = estimator.table_
    numeric = tuple(i for i, column in enumerate(columns) if column.numeric)
    if table.names != tuple(column.name for column in columns) or table.numeric != numeric:
        raise BundleError(
            f"the estimator reads numbers from {[table.names[i] for i in table.numeric]} of "
            f"{list(table.names)}, the bundle from {[columns[i].name for i in numeric]} of "
            f"{[column.name for column in columns]}: nothing was exported"
        )


def label_text(label: Any) -> str:
    """Return a class as text, as the manifest has it."""
    return str(label).lower() if isinstance(label, bool | np.bool_) else str(label)
