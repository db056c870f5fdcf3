"""Rows as people have them to the two matrices that the graph of a table reads.

Categories are text to the graph, by the rules that the estimators have: `true` and `false`, whole
numbers without a point, and the empty text for what is missing.
"""

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hashtab.features.plain import did_you_mean
from hashtab.serving.errors import RequestError
from hashtab.serving.table_manifest import Column

NUMERIC, CATEGORICAL = "numeric", "categorical"  # inputs of the graph


class Frame(Protocol):
    """A frame of polars or pandas: pandas is not imported here."""

    @property
    def columns(self) -> Any:
        """Names of the columns."""

    def __getitem__(self, name: str, /) -> Any:
        """Return a column."""


Rows = Sequence[Mapping[str, Any]] | Mapping[str, Any] | Frame | NDArray[Any]


def matrices(rows: Rows, columns: Sequence[Column]) -> dict[str, NDArray[Any]]:
    """Return the inputs of the graph by name: those of the two kinds that the model reads.

    Args:
        rows: N rows: a sequence of mappings, a mapping of columns, a frame of polars or pandas, or
            an array `[N, F]` with the columns in their order.
        columns: that the model reads.

    Returns:
        `numeric` float64 `[N, Fn]` and `categorical` object `[N, Fc]`, text.

    Raises:
        RequestError: if a column is missing, or holds what is no number where one is needed.
    """
    found = {column.name: values for column, values in _values(rows, columns)}
    count = len(next(iter(found.values())))
    if any(len(values) != count for values in found.values()):
        lengths = {name: len(values) for name, values in found.items()}
        raise RequestError(f"all columns must be of one length, got {lengths}")
    numeric = [column.name for column in columns if column.numeric]
    categorical = [column.name for column in columns if not column.numeric]
    feed: dict[str, NDArray[Any]] = {}
    if numeric:
        feed[NUMERIC] = np.empty((count, len(numeric)))
        for i, name in enumerate(numeric):
            feed[NUMERIC][:, i] = numbers(name, found[name])
    if categorical:
        feed[CATEGORICAL] = np.empty((count, len(categorical)), object)
        for i, name in enumerate(categorical):
            feed[CATEGORICAL][:, i] = texts(name, found[name])
    return feed


def _values(rows: Rows, columns: Sequence[Column]) -> list[tuple[Column, Any]]:
    """Return the values of each column, of whatever type they come in."""
    names = [column.name for column in columns]
    if isinstance(rows, Mapping):
        _check_columns(names, list(rows))
        if single := [name for name in names if isinstance(rows[name], str | Number | None)]:
            raise RequestError(
                f"a mapping must hold columns, but {single[0]!r} is one value: give a row as [row]"
            )
        return [(column, rows[column.name]) for column in columns]
    if isinstance(rows, np.ndarray):
        if rows.ndim != 2 or rows.shape[1] != len(names):
            raise RequestError(f"an array of rows must be [N, {len(names)}], got {rows.shape}")
        return [(column, rows[:, i]) for i, column in enumerate(columns)]
    if isinstance(rows, Sequence):
        return _of_mappings(rows, columns)
    # A LazyFrame, whose values are not there yet, has no shape.
    if not (hasattr(rows, "shape") and hasattr(rows, "columns")):
        raise RequestError(
            "rows must be a list of mappings, a mapping of columns, a frame of polars or pandas, "
            f"or an array, got a {type(rows).__name__}"
        )
    there = list(rows.columns)
    _check_columns(names, there)
    if twice := [name for name in names if there.count(name) > 1]:
        raise RequestError(f"the table has more than one column {twice[0]!r}")
    return [(column, rows[column.name]) for column in columns]


def _of_mappings(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]
) -> list[tuple[Column, Any]]:
    names = [column.name for column in columns]
    try:
        return [(column, [row[column.name] for row in rows]) for column in columns]
    except KeyError:
        number, row = next((i, r) for i, r in enumerate(rows) if not r.keys() >= set(names))
        _check_columns(names, list(row), f"row {number}")
        raise


def _check_columns(wanted: Sequence[str], there: Sequence[str], where: str = "the table") -> None:
    for name in wanted:
        if name not in there:
            raise RequestError(
                f"{where} has no column {name!r}, which the model reads{did_you_mean(name, there)}"
            )


def numbers(name: str, values: Any) -> NDArray[np.float64]:
    """Return values as float64, NaN where one is missing.

    Args:
        name: of their column.
        values: numbers, or None; a column of polars or pandas does as well.

    Raises:
        RequestError: if one is no number.
    """
    array = values.to_numpy() if hasattr(values, "to_numpy") else values
    if isinstance(array, np.ndarray) and array.dtype.kind in "fiub":
        return array.astype(np.float64, copy=False)
    listed = _listed(values)
    try:
        return np.array([np.nan if _is_missing(value) else value for value in listed], np.float64)
    except (TypeError, ValueError) as error:
        wrong = next((value for value in listed if not _is_number(value)), None)
        raise RequestError(
            f"column {name!r} must hold numbers, got {wrong!r}; leave a missing value empty"
        ) from error


def _is_number(value: Any) -> bool:
    try:
        float(np.nan if _is_missing(value) else value)
    except (TypeError, ValueError):
        return False
    return True


def texts(name: str, values: Any) -> list[str]:
    """Return categories as text, empty where one is missing.

    Args:
        name: of their column.
        values: text, numbers, truth values, or None; a column of polars or pandas does as well.

    Raises:
        RequestError: if one is none of these.
    """
    return [value if type(value) is str else _text(name, value) for value in _listed(values)]


def _listed(values: Any) -> Any:
    """Return Python's own values of an array, or of a frame's column."""
    if isinstance(values, np.ndarray):
        return values.tolist()
    return values.to_list() if hasattr(values, "to_list") else values


def _is_missing(value: Any) -> bool:
    """Whether a value is None, or what pandas has in its place."""
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def _text(name: str, value: Any) -> str:
    if _is_missing(value):
        return ""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating):
        if np.isnan(value):
            return ""
        return str(int(value)) if float(value).is_integer() else str(value)
    if isinstance(value, str | int | np.integer):
        return str(value)
    if isinstance(value, bytes):
        return value.decode()
    raise RequestError(
        f"column {name!r} must hold text, numbers or truth values, got {type(value).__name__}"
    )
