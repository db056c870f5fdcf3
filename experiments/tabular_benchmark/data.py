"""Tables of the benchmark as they lie in a folder: parquet files and a MANIFEST.json."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[Any]
Task = Literal["binary", "multiclass", "regression"]

TARGET = "target"


class DataError(ValueError):
    """Data that the benchmark must not be run on."""


@dataclass(frozen=True)
class Table:
    """One data set.

    Args:
        name: of the file without `.parquet`.
        task: what is predicted.
        features: `[N]` rows; every column is numeric or a pandas category, missing cells are kept.
        target: `[N]`, class numbers from 0 (int64) or values (float64).
    """

    name: str
    task: Task
    features: pd.DataFrame
    target: Array

    @property
    def classes(self) -> int:
        """Number of classes; 0 for regression."""
        return 0 if self.task == "regression" else int(self.target.max()) + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, kinds and cells, whatever the file's compression."""
        found = hashlib.sha256(self.task.encode())
        for name, column in self.features.items():
            found.update(f"\0{name}\0".encode())
            if isinstance(column.dtype, pd.CategoricalDtype):
                cells = column.astype(object).where(column.notna(), None)
                found.update("\x1f".join("\0" if c is None else str(c) for c in cells).encode())
            else:
                found.update(column.to_numpy(np.float64, na_value=np.nan).tobytes())
        found.update(self.target.tobytes())
        return found.hexdigest()

    @property
    def repeated_rows(self) -> int:
        """Rows that have an exact copy, target included: natural in small domains, so told only."""
        rows = self.features.join(pd.Series(self.target, self.features.index, name=TARGET))
        return int(rows.duplicated(keep=False).sum())


def names(folder: Path) -> list[str]:
    """Return the sets that the folder's manifest lists, in its order."""
    return list(_manifest(folder))


def load(folder: Path, name: str) -> Table:
    """Read one set.

    Raises:
        DataError: for a set that the manifest does not list, an unknown task, a missing target, or
            synthetic rows.
    """
    listed = _manifest(folder)
    if name not in listed:
        raise DataError(f"{folder} has no set {name!r}; it has {', '.join(listed)}")
    if listed[name] not in get_args(Task):
        raise DataError(f"{name}: task {listed[name]!r} is none of {get_args(Task)}")
    task = cast(Task, listed[name])
    frame = pd.read_parquet(folder / f"{name}.parquet")
    target = frame.pop(TARGET).to_numpy()
    if pd.isna(target).any():
        raise DataError(f"{name}: column {TARGET!r} has missing values")
    numeric = frame.select_dtypes("number").columns
    frame = frame.astype({c: "category" for c in frame.columns if c not in numeric})
    if task == "regression":
        target = target.astype(np.float64)
    else:
        target = np.unique(target, return_inverse=True)[1].astype(np.int64)
    table = Table(name, task, frame, target)
    refuse_synthetic_rows(table)
    return table


def refuse_synthetic_rows(table: Table) -> None:
    """Refuse rows made by interpolation, as SMOTE makes them: one-hot columns with fractions.

    Oversampling before the split puts mixtures of test rows into training. Such a row has, in
    columns that are 0 or 1 in most rows, fractions that add up to a whole number: a level and its
    neighbour's. Real data has no such rows.

    Raises:
        DataError: names the set and one such row.
    """
    # NOTE: no other trace of interpolation is certain enough to refuse data for.
    numeric = table.features.select_dtypes("number").to_numpy(np.float64, na_value=np.nan)
    inside = ((numeric >= 0) & (numeric <= 1)).all(axis=0)
    numeric = numeric[:, inside]
    fraction = (numeric > 0) & (numeric < 1)
    one_hot = (fraction.mean(axis=0) > 0) & (fraction.mean(axis=0) < 0.5)
    fraction, numeric = fraction[:, one_hot], numeric[:, one_hot]
    mixed = np.flatnonzero(fraction.sum(axis=1) >= 2)
    if not mixed.size:
        return
    sums = np.where(fraction, numeric, 0).sum(axis=1)[mixed]
    whole = np.abs(sums - sums.round()) < 1e-6
    if whole.mean() > 0.5:
        row = int(mixed[whole][0])
        raise DataError(
            f"{table.name}: {int(whole.sum())} rows, row {row} for one, have fractions in one-hot "
            "columns that add up to a whole number: oversampled before the split. Use clean data"
        )


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / "MANIFEST.json"
    if not path.exists():
        raise DataError(f"{folder} has no MANIFEST.json with the name and task of each set")
    return {entry["name"]: entry["task"] for entry in json.loads(path.read_text())}
