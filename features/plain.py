"""Frozen dataclasses from plain data (JSON, YAML); unknown keys and wrong types are errors."""

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hashtab.features.errors import DataError


def build(kind: Any, value: Any, where: str) -> Any:
    """Build a value of type `kind`: a dataclass, str, int, float, Literal, union, tuple or dict.

    Args:
        kind: the wanted type.
        value: plain data.
        where: the value's dotted name, for errors.

    Raises:
        DataError: naming the key that is unknown, missing or of a wrong type.
    """
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        return _build_union(kind, value, where)
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise DataError(f"{where} must be one of {list(get_args(kind))}, got {value!r}")
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        element = get_args(kind)[0]
        return tuple(build(element, part, f"{where}[{i}]") for i, part in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        element = get_args(kind)[1]
        return {key: build(element, part, f"{where}.{key}") for key, part in value.items()}
    number = isinstance(value, bool) and kind is not bool  # Python counts True among the integers
    if isinstance(kind, type) and isinstance(value, kind) and not number:
        return value
    raise DataError(f"{where} must be {_words(kind)}, got {value!r}")


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} must be a mapping of {kind.__name__}'s keys, got {value!r}")
    hints = get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in known:
            raise DataError(f"{where} has no key {key!r}{did_you_mean(str(key), list(known))}")
    for name, field in known.items():
        default = (field.default, field.default_factory)
        if name not in value and default == (dataclasses.MISSING, dataclasses.MISSING):
            raise DataError(f"{where} needs the key {name!r}")
    parts = {key: build(hints[key], part, f"{where}.{key}") for key, part in value.items()}
    try:
        return kind(**parts)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _build_union(kind: Any, value: Any, where: str) -> Any:
    options = get_args(kind)
    if value is None and types.NoneType in options:
        return None
    rest = [option for option in options if option is not types.NoneType]
    for option in rest[:-1]:
        if isinstance(option, type) and isinstance(value, option) and not isinstance(value, bool):
            return value
    return build(rest[-1], value, where)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """End of an error message: the nearest known name, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}"


def _words(kind: Any) -> str:
    words = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return words.get(kind, "a list" if get_origin(kind) is tuple else str(kind))
