"""Plain values to ids and scaled numbers: to the bit what the encoders make of columns."""

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from hashtab.features.encoders import FIRST_ID, UNKNOWN_ID, Encoder, Scaler, Vocabulary
from hashtab.features.storage import Array

Value = bool | int | float | str | None

_INT64 = np.iinfo(np.int64)


class PlainEncoder:
    """Encodes values as `Encoder.encode` does a column of their type, without a data frame.

    A list may mix types; each value counts as a column of its own type would.

    Args:
        encoder: of a feature.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._ids: dict[Value, int] = {}
        if isinstance(encoder, Vocabulary):
            self._ids = {value: FIRST_ID + i for i, value in enumerate(encoder.values)}
            self._text = bool(encoder.values) and isinstance(encoder.values[0], str)

    @property
    def numeric(self) -> bool:
        """Whether it takes numbers alone."""
        return isinstance(self._encoder, Scaler)

    def encode(self, values: Sequence[Value]) -> Array:
        """Return int32 ids or float32 numbers, `[N]`."""
        if isinstance(self._encoder, Scaler):
            return _scaled(self._encoder, _numbers(values))
        get = self._ids.get
        ids = np.array([get(value, 0) for value in values], np.int32)
        missed = np.flatnonzero(ids == 0).tolist()
        if missed:
            ids[missed] = UNKNOWN_ID
            self._by_type(values, missed, ids)
        return ids

    def encode_one(self, value: Value) -> np.int32 | np.float32:
        """Return the id or number of one value."""
        known = self._ids.get(value)
        one: np.int32 | np.float32 = self.encode([value])[0] if known is None else np.int32(known)
        return one

    def missing(self, values: Sequence[Value], encoded: Array) -> list[int]:
        """Return the places of values that are none: what `encoded` is of unknown or mean value."""
        blank = 0 if self.numeric else UNKNOWN_ID
        return [i for i in np.flatnonzero(encoded == blank).tolist() if is_missing(values[i])]

    def _by_type(self, values: Sequence[Value], missed: list[int], ids: Array) -> None:
        """Encode values of other types than the vocabulary's in columns, one for each type.

        Those of its own type were looked for already.
        """
        other = int if self._text else str
        for kind, dtype in ((bool, pl.Boolean), (float, pl.Float64), (other, pl.String)):
            places = [i for i in missed if type(values[i]) is kind]
            # Integers as text: they may have more than 64 bits.
            column = [str(values[i]) if kind is int else values[i] for i in places]
            if places:
                frame = pl.DataFrame({"value": pl.Series(column, dtype=dtype)})
                encoded = frame.select(self._encoder.encode(pl.col("value")))
                ids[places] = encoded.to_series().to_numpy()


def is_missing(value: Value) -> bool:
    """Whether there is no value, or a number that is none."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _scaled(scaler: Scaler, numbers: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = ((numbers - scaler.mean) / scaler.std).astype(np.float32)
    return np.where(np.isfinite(scaled), scaled, np.float32(0))


def _numbers(values: Sequence[Value]) -> Array:
    try:
        return np.array(values, np.float64)  # None becomes NaN
    except OverflowError:
        return np.array([_number(value) for value in values], np.float64)


def _number(value: Value) -> float:
    try:
        return math.nan if value is None else float(value)
    except OverflowError:
        return math.inf
