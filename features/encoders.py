"""Raw values to ids and scaled numbers: the same code at preparation and at serving."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

PADDING_ID = 0
UNKNOWN_ID = 1
FIRST_ID = 2


@dataclass(frozen=True)
class Vocabulary:
    """Ids of a categorical feature: 0 padding, 1 unknown or missing, then the known values.

    Args:
        values: known values in ascending order, integers or strings.
    """

    values: tuple[int | str, ...]

    @classmethod
    def fit(cls, values: pl.Series) -> Self:
        """Learn the distinct values that are not missing."""
        known = values.drop_nulls().unique().sort()
        if not known.dtype.is_integer():
            known = known.cast(pl.String).sort()
        return cls(tuple(known.to_list()))

    @property
    def size(self) -> int:
        """Number of ids, padding and unknown included."""
        return FIRST_ID + len(self.values)

    def encode(self, column: pl.Expr) -> pl.Expr:
        """Return Int32 ids."""
        text = bool(self.values) and isinstance(self.values[0], str)
        known = pl.Series(self.values, dtype=pl.String if text else pl.Int64)
        ids = pl.int_range(FIRST_ID, self.size, dtype=pl.Int32, eager=True)
        return column.cast(known.dtype, strict=False).replace_strict(
            known, ids, default=UNKNOWN_ID, return_dtype=pl.Int32
        )


@dataclass(frozen=True)
class Scaler:
    """A numeric feature in standard units; missing values become 0, the training mean.

    Args:
        mean: of the training values.
        std: of the training values, 1 where they do not vary.
    """

    mean: float
    std: float

    @classmethod
    def fit(cls, values: pl.Series) -> Self:
        """Learn mean and standard deviation of the finite values."""
        finite = values.cast(pl.Float64).drop_nulls()
        # Sorted, so that the order of rows and files cannot change the last bits of the sums.
        numbers = finite.filter(finite.is_finite()).sort().to_numpy()
        if not len(numbers):
            return cls(mean=0.0, std=1.0)
        return cls(mean=float(np.mean(numbers)), std=float(np.std(numbers)) or 1.0)

    @property
    def size(self) -> int:
        """Numbers a value."""
        return 1

    def encode(self, column: pl.Expr) -> pl.Expr:
        """Return Float32 values."""
        scaled = (column.cast(pl.Float64) - self.mean) / self.std
        return pl.when(scaled.is_finite()).then(scaled).otherwise(0.0).cast(pl.Float32)


Encoder = Vocabulary | Scaler


def fit(kind: str, values: Iterable[pl.Series]) -> Encoder:
    """Fit the encoder of a `"categorical"` or `"numeric"` feature on all its training values."""
    series = pl.concat([part.rename("value") for part in values])
    return Vocabulary.fit(series) if kind == "categorical" else Scaler.fit(series)


def to_json(encoders: Mapping[str, Encoder]) -> str:
    """Encoders by feature name as JSON."""
    plain: dict[str, Any] = {}
    for name, encoder in sorted(encoders.items()):
        if isinstance(encoder, Vocabulary):
            plain[name] = {"values": encoder.values}
        else:
            plain[name] = {"mean": encoder.mean, "std": encoder.std}
    return json.dumps(plain, ensure_ascii=False)


def load(path: str | os.PathLike[str]) -> dict[str, Encoder]:
    """Read encoders that `to_json` wrote."""
    plain = json.loads(Path(path).read_text())
    return {
        name: Vocabulary(tuple(part["values"])) if "values" in part else Scaler(**part)
        for name, part in plain.items()
    }
