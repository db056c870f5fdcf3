"""Raw values to ids and scaled numbers: the same code at preparation and at serving."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from hashtab.features.storage import Array

PADDING_ID = 0
UNKNOWN_ID = 1
FIRST_ID = 2
_LEAST_VARIATION = 1e-9  # a spread of so little of the mean is rounding noise
_MEAN_BITS = 20


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
        # pandas writes a missing category among numbers as NaN.
        known = values.fill_nan(None) if values.dtype.is_float() else values
        known = known.drop_nulls().unique().sort()
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
class Moments:
    """What a scale is learned from; the moments of parts add up to those of the whole.

    Args:
        count: of the finite values.
        mean: of them.
        squares: sum of their squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: pl.Series) -> Self:
        """Measure the finite values of a numeric column."""
        numbers = values.cast(pl.Float64).drop_nulls()
        numbers = numbers.filter(numbers.is_finite()).sort()  # the order of rows must not show
        if not len(numbers):
            return cls()
        finite = numbers.to_numpy()
        return cls(len(finite), float(np.mean(finite)), float(np.var(finite) * len(finite)))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        between = apart**2 * self.count * other.count / count
        mean = self.mean + apart * other.count / count
        return Moments(count, mean, self.squares + other.squares + between)


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
    def of(cls, moments: Moments) -> Self:
        """Learn the scale; its last bits are rounded off, for they depend on how parts were cut."""
        std = float(np.float32(math.sqrt(moments.squares / max(moments.count, 1))))
        if std <= _LEAST_VARIATION * abs(moments.mean):
            return cls(mean=moments.mean, std=1.0)
        step = 2.0 ** (math.floor(math.log2(std)) - _MEAN_BITS)
        return cls(mean=round(moments.mean / step) * step, std=std)

    @property
    def size(self) -> int:
        """Numbers a value."""
        return 1

    def encode(self, column: pl.Expr) -> pl.Expr:
        """Return Float32 values."""
        scaled = ((column.cast(pl.Float64) - self.mean) / self.std).cast(pl.Float32)
        return pl.when(scaled.is_finite()).then(scaled).otherwise(pl.lit(0.0, pl.Float32))


Encoder = Vocabulary | Scaler


def fit(kind: str, values: pl.Series) -> Encoder:
    """Fit the encoder of a `"categorical"` or `"numeric"` feature on all its training values."""
    return Vocabulary.fit(values) if kind == "categorical" else Scaler.of(Moments.of(values))


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


def translation(before: Encoder, after: Encoder) -> Callable[[Array], Array]:
    """Return what turns ids or numbers of one encoder into those of another of its kind.

    Values that the other does not know become unknown.
    """
    if before == after:
        return lambda column: column
    if isinstance(before, Vocabulary) and isinstance(after, Vocabulary):
        known = {value: FIRST_ID + i for i, value in enumerate(after.values)}
        ids = [PADDING_ID, UNKNOWN_ID, *(known.get(value, UNKNOWN_ID) for value in before.values)]
        table = np.array(ids, np.int32)
        return lambda column: table[column]
    assert isinstance(before, Scaler)
    assert isinstance(after, Scaler)
    slope, start = before.std / after.std, (before.mean - after.mean) / after.std
    # 0 is a number that is missing, and stays so; the mean itself cannot be told from it.
    return lambda column: np.where(column == 0, 0, column * slope + start).astype(np.float32)
