"""Fixed splits: made from the number of rows and the target alone, held by hashes in splits.json.

Under 2,500 rows 10 x 3-fold, up to 50,000 rows 3 x 3-fold, above that 3 holdouts of 70/10/20.
Folds are stratified for classification. Each training part has one inner validation part, 20 % of
it (the 10 % of a holdout), for early stopping and tuning; test parts are for scores only.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from experiments.tabular_benchmark.data import Array, DataError, Table

SPLITS = Path(__file__).parent / "splits.json"
FOLDS = 3
INNER_SHARE = 0.2
HOLDOUT_INNER = 0.125  # of the remaining 80 % is the 10 %


@dataclass(frozen=True)
class Split:
    """Row numbers of one split, each part in ascending order.

    Args:
        name: such as `r0f2`, repeat 0, fold 2; `h1` for a holdout.
        index: position among the set's splits; also the random state of every model.
        fit: rows that models learn from when they need the inner validation part.
        inner: rows of inner validation.
        test: rows that only scores see.
    """

    name: str
    index: int
    fit: Array
    inner: Array
    test: Array

    @property
    def train(self) -> Array:
        """All rows of the training part: `fit` and `inner`."""
        return np.sort(np.concatenate([self.fit, self.inner]))

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the three parts."""
        found = hashlib.sha256()
        for part in (self.fit, self.inner, self.test):
            found.update(np.int64(len(part)).tobytes() + part.astype("<i8").tobytes())
        return found.hexdigest()[:16]


def make_splits(table: Table) -> list[Split]:
    """Return all splits of a set, in the order in which they are run."""
    labels = table.target if table.classes else np.zeros(len(table.target), np.int64)
    return [
        Split(name, index, *_inner(labels, ~test, share, index), np.flatnonzero(test))
        for index, (name, test, share) in enumerate(_outer(labels))
    ]


def describe(table: Table) -> dict[str, Any]:
    """Return what splits.json holds of a set."""
    return {
        "rows": len(table.target),
        "repeated_rows": table.repeated_rows,
        "data": table.digest,
        "splits": {split.name: split.digest for split in make_splits(table)},
    }


def stored() -> dict[str, dict[str, Any]]:
    """Return splits.json: for each set rows, repeated rows, hash of the data, hash per split."""
    return cast(dict[str, dict[str, Any]], json.loads(SPLITS.read_text()))


def verify(table: Table) -> None:
    """Hold data and splits of a set against splits.json.

    Raises:
        DataError: when the set is not in it, or either is different.
    """
    known = stored().get(table.name)
    if known is None:
        raise DataError(f"{table.name} is not in {SPLITS.name}; `tabular.py splits` writes it")
    if known["data"] != table.digest:
        raise DataError(f"{table.name}: the data differ from those that {SPLITS.name} was made of")
    if known["splits"] != {split.name: split.digest for split in make_splits(table)}:
        raise DataError(f"{table.name}: the splits made here differ from those in {SPLITS.name}")


def _outer(labels: Array) -> Iterator[tuple[str, Array, float]]:
    """Yield name, mask of test rows and share of inner validation of each split."""
    rows = len(labels)
    if rows > 50_000:
        for repeat in range(3):
            yield f"h{repeat}", _deal(labels, 5, repeat) == 0, HOLDOUT_INNER
        return
    for repeat in range(10 if rows < 2_500 else 3):
        folds = _deal(labels, FOLDS, repeat)
        for fold in range(FOLDS):
            yield f"r{repeat}f{fold}", folds == fold, INNER_SHARE


def _inner(labels: Array, train: Array, share: float, seed: int) -> tuple[Array, Array]:
    rows = np.flatnonzero(train)
    inner = _deal(labels[rows], round(1 / share), 1_000 + seed) == 0
    return rows[~inner], rows[inner]


def _deal(labels: Array, parts: int, seed: int) -> Array:
    """Deal rows into parts as cards, class by class, so that each part has its share of each.

    RandomState and not Generator: its stream is promised never to change, so that hashes hold.
    """
    random = np.random.RandomState(seed)
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    dealt = np.empty(len(labels), np.int64)
    dealt[order] = np.arange(len(labels)) % parts
    return dealt
