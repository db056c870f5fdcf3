"""The context of a request, from plain values to what the model reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hashtab.features.encoders import FIRST_ID, UNKNOWN_ID
from hashtab.features.storage import Array
from hashtab.serving.bundle import Bundle
from hashtab.serving.scorer.values import PlainEncoder, Value, is_missing

Given = Mapping[str, Value | list[Value]]

_HOUR_US = 3_600_000_000
_DAY_US = 24 * _HOUR_US
_EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday, Monday is 0


class ContextError(ValueError):
    """A value of the context that cannot be encoded.

    Args:
        feature: its name.
        message: says what is wrong with the value.
    """

    def __init__(self, feature: str, message: str) -> None:
        super().__init__(message)
        self.feature = feature


@dataclass(frozen=True, slots=True)
class Context:
    """The encoded context of a request.

    Args:
        columns: feature -> `[C]`, int32 ids or float32.
        missing: candidates that lack a value of some feature.
    """

    columns: dict[str, Array]
    missing: int


class ContextEncoder:
    """Encodes the context features of a model.

    Args:
        bundle: of the model.
    """

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.time_features = manifest.time_features
        self.encoders = {
            feature.name: PlainEncoder(bundle.encoders[feature.name])
            for feature in manifest.features.context
            if feature.name not in manifest.time_features
        }

    def encode(self, given: Given, time: int | None, count: int) -> Context:
        """Encode the context of one request.

        Args:
            given: by feature one value, or a list with one for each candidate. What is not there
                is missing; what the model does not read is not looked at.
            time: of the request, microseconds since 1970 UTC; None where it is missing.
            count: C, candidates.

        Raises:
            ContextError: naming a feature with values of the wrong kind or number.
        """
        columns: dict[str, Array] = {}
        everywhere = bool(self.time_features) and time is None
        missing: set[int] = set()  # candidates
        for name, encoder in self.encoders.items():
            value = given.get(name)
            if isinstance(value, list):
                _check(name, value, encoder, count)
                columns[name] = encoder.encode(value)
                missing.update(encoder.missing(value, columns[name]))
            else:
                _check(name, [value], encoder, 1)
                columns[name] = np.full(count, encoder.encode_one(value))
                everywhere = everywhere or is_missing(value)
        for name in self.time_features:
            columns[name] = np.full(count, time_id(name, time), np.int32)
        return Context(columns, count if everywhere else len(missing))


def time_id(name: str, time: int | None) -> int:
    """Return a feature of one time as `features.samples.time_features` does of a column."""
    if time is None:
        return UNKNOWN_ID
    if name == "hour":
        return time // _HOUR_US % 24 + FIRST_ID
    return (time // _DAY_US + _EPOCH_WEEKDAY) % 7 + FIRST_ID


def _check(name: str, values: Sequence[Value], encoder: PlainEncoder, count: int) -> None:
    if len(values) != count:
        raise ContextError(
            name, f"must be one value or a list of one for each candidate, got {len(values)}"
        )
    if encoder.numeric and str in map(type, values):
        text = next(value for value in values if isinstance(value, str))
        raise ContextError(name, f"must be a number, got {text[:40]!r}")
