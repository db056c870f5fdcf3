"""What the columns of a table are, and a frame's values as two matrices: numbers and categories.

Frames are read by their methods alone, so neither pandas nor polars is imported here.
"""

import copy
import datetime
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import check_array

from hashtab.models.tabular.advice import of_categories

Numbers = npt.NDArray[np.float64]
Categories = npt.NDArray[np.object_]
Codes = npt.NDArray[np.int64]

UNSEEN, MISSING, FIRST_CODE = 0, 1, 2

_TIMES = ("date", "time", "duration", "period", "interval")
_NUMBERS = ("int", "uint", "float", "decimal", "double")
_NAMES = ("cat", "enum", "str", "object", "bool", "utf8", "<u", "|s", "null")


class Frame:
    """A table of any library as named columns.

    Args:
        x: a pandas or polars frame, or whatever numpy turns into `[N, F]`.
        estimator: named in errors.

    Raises:
        TypeError: `x` is sparse, or holds neither numbers nor text.
        ValueError: `x` is empty, not two-dimensional, or two columns have one name.
    """

    def __init__(self, x: Any, estimator: object) -> None:
        self.named = _is_frame(x)
        if self.named:
            self.names = tuple(str(name) for name in x.columns)
            self._columns = dict(zip(self.names, x.columns, strict=True))
            self.named = all(isinstance(name, str) for name in x.columns)
            if len(self._columns) < len(self.names):
                twice = sorted({name for name in self.names if self.names.count(name) > 1})
                raise ValueError(f"column names must differ, got more than one of {twice}")
            if len(x) == 0 or not self.names:
                raise ValueError(
                    f"Found array with {len(x)} sample(s) and {len(self.names)} feature(s) "
                    "while a minimum of 1 is required."
                )
        else:
            x = check_array(x, dtype=None, ensure_all_finite=False, estimator=estimator)
            self.names = tuple(f"x{i}" for i in range(x.shape[1]))
            self._columns = {name: (slice(None), i) for i, name in enumerate(self.names)}
        self._x = x
        self.rows = len(x)

    def column(self, name: str) -> Any:
        """Return the column of that name, of the frame's own type."""
        return self._x[self._columns[name]]

    def rows_where(self, kept: npt.NDArray[np.bool_]) -> "Frame":
        """Return a frame of some rows."""
        part = copy.copy(self)
        part._x = self._x[kept] if isinstance(self._x, np.ndarray) else _filtered(self._x, kept)
        part.rows = int(kept.sum())
        return part

    def like(self, values: npt.NDArray[Any]) -> Any:
        """Return values `[N, F]` as a frame of the same type, rows and names; else as they are."""
        if isinstance(self._x, np.ndarray):
            return values
        columns = {self._columns[name]: values[:, i] for i, name in enumerate(self.names)}
        rows = {"index": self._x.index} if hasattr(self._x, "index") else {}  # of pandas
        return type(self._x)(columns, **rows)

    @property
    def matrix(self) -> Numbers | None:
        """All columns as numbers, if the table is one matrix of numbers, at no cost."""
        if isinstance(self._x, np.ndarray) and self._x.dtype.kind in "iuf":
            return self._x.astype(np.float64, copy=False)
        return None


def _filtered(x: Any, kept: npt.NDArray[np.bool_]) -> Any:
    return x.filter(kept) if hasattr(x, "lazy") else x[kept]  # polars, pandas


def _is_frame(x: Any) -> bool:
    return hasattr(x, "columns") and hasattr(x, "__getitem__") and hasattr(x, "shape")


@dataclass(frozen=True)
class Table:
    """The columns that an estimator was fitted on.

    Args:
        names: of all columns, in order.
        named: whether the names are the user's own, so that later frames are matched by them.
        numeric: positions of the columns of numbers.
        categorical: positions of the columns of categories.
        categories: of each categorical column, as text; a category's code is its index + 2,
            code 0 is a category that fitting did not see, code 1 a missing one.
    """

    names: tuple[str, ...]
    named: bool
    numeric: tuple[int, ...]
    categorical: tuple[int, ...]
    categories: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, frame: Frame, declared: Sequence[str | int] | None) -> "Table":
        """Read what the columns of `frame` are, and warn of columns of text that look odd.

        Args:
            frame: the table to fit on.
            declared: names or positions of columns that are categorical whatever their type.

        Raises:
            TypeError: a column holds dates or other things that are no table's values.
            ValueError: a declared column is not in the table.
        """
        listed = _positions(frame.names, declared)
        if frame.matrix is not None:
            kinds = [False] * len(frame.names)
        else:
            kinds = [_is_categorical(name, frame.column(name)) for name in frame.names]
        chosen = listed | {i for i, kind in enumerate(kinds) if kind}
        categorical = tuple(sorted(chosen))
        counts = {i: Counter(filter(None, _texts(frame, frame.names[i]))) for i in categorical}
        if frame.named:
            _warn_of_odd_ones(frame, counts, listed)
        return cls(
            names=frame.names,
            named=frame.named,
            numeric=tuple(i for i in range(len(kinds)) if i not in chosen),
            categorical=categorical,
            categories=tuple(tuple(sorted(counts[i])) for i in categorical),
        )

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Table":
        """Return the table that `dataclasses.asdict` made `plain` of, maybe by way of JSON."""
        parts: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()
        }
        parts["categories"] = tuple(tuple(known) for known in parts["categories"])
        return cls(**parts)

    def frame(self, x: Any, estimator: object) -> Frame:
        """Return `x` as a frame that has every column of this table, under its name.

        Raises:
            ValueError: columns are missing, or an array has another number of columns.
        """
        frame = Frame(x, estimator)
        if self.named and frame.named:
            missing = [name for name in self.names if name not in frame._columns]
            if missing:
                raise ValueError(f"columns seen in fit are missing now: {missing}")
            frame.names = self.names
            return frame
        if len(frame.names) != len(self.names):
            raise ValueError(
                f"X has {len(frame.names)} features, but {type(estimator).__name__} "
                f"is expecting {len(self.names)} features as input"
            )
        if self.named:
            warnings.warn(
                f"X has no column names, but {type(estimator).__name__} was fitted with them: "
                "columns are taken in the order of fit",
                UserWarning,
                stacklevel=4,
            )
        frame._columns = dict(zip(self.names, frame._columns.values(), strict=True))
        frame.names = self.names
        return frame

    def values(self, frame: Frame) -> tuple[Numbers, Categories]:
        """Return numbers `[N, Fn]`, NaN where missing, and categories `[N, Fc]`, None likewise."""
        numbers = self._numbers(frame)
        categories = np.empty((frame.rows, len(self.categorical)), dtype=object)
        for j, i in enumerate(self.categorical):
            categories[:, j] = _texts(frame, self.names[i])
        return numbers, categories

    def codes(self, categories: Categories) -> Codes:
        """Return the codes `[N, Fc]` of categories: 0 unseen, 1 missing, index + 2 the others."""
        codes = np.empty(categories.shape, dtype=np.int64)
        for j, known in enumerate(self.categories):
            code = {text: i + FIRST_CODE for i, text in enumerate(known)}
            column = categories[:, j].tolist()
            codes[:, j] = [MISSING if v is None else code.get(v, UNSEEN) for v in column]
        return codes

    def _numbers(self, frame: Frame) -> Numbers:
        matrix = frame.matrix
        if matrix is not None and len(self.numeric) == len(self.names):
            return matrix
        numbers = np.empty((frame.rows, len(self.numeric)))
        for j, i in enumerate(self.numeric):
            name = self.names[i]
            numbers[:, j] = matrix[:, i] if matrix is not None else _floats(name, frame)
        return numbers


def _positions(names: tuple[str, ...], declared: Sequence[str | int] | None) -> set[int]:
    positions = set()
    for column in declared or ():
        if isinstance(column, str) and column in names:
            positions.add(names.index(column))
        elif isinstance(column, (int, np.integer)) and 0 <= column < len(names):
            positions.add(int(column))
        else:
            raise ValueError(
                f"categorical_features must be names or positions of columns, got {column!r}; "
                f"the columns are {list(names[:20])}{' ...' if len(names) > 20 else ''}"
            )
    return positions


def _warn_of_odd_ones(frame: Frame, counts: dict[int, Counter[str]], declared: set[int]) -> None:
    for i, of_column in counts.items():
        name = frame.names[i]
        by_type = str(frame.column(name).dtype).lower().startswith(("cat", "enum"))
        advice = of_categories(name, of_column, not by_type and i not in declared)
        if advice is not None:
            warnings.warn(advice, UserWarning, stacklevel=4)


def _is_categorical(name: str, column: Any) -> bool:
    dtype = str(column.dtype).lower()
    if any(dtype.startswith(time) for time in _TIMES):
        raise TypeError(_no_times(name, dtype))
    if dtype.startswith("object"):
        return _holds_names(name, _values(column))
    if dtype.startswith(_NUMBERS):
        return False
    if dtype.startswith(_NAMES):
        return True
    raise TypeError(f"column {name!r} must hold numbers or categories, got dtype {dtype}")


def _no_times(name: str, dtype: str) -> str:
    return (
        f"column {name!r} holds dates or times ({dtype}); turn it into numbers that mean something "
        "for the target, such as days since an event, month or weekday, or drop it"
    )


def _holds_names(name: str, values: list[Any]) -> bool:
    present = [value for value in values if not _is_missing(value)]
    if any(isinstance(v, (datetime.date, datetime.time, datetime.timedelta)) for v in present):
        raise TypeError(_no_times(name, "object"))
    return not present or any(isinstance(v, (str, bytes, bool, np.bool_)) for v in present)


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.floating)) and value != value


def _texts(frame: Frame, name: str) -> list[str | None]:
    values = _values(frame.column(name))
    kinds = set(map(type, values))
    keys: list[Any] = values
    if len(kinds) > 1 and kinds & {bool, np.bool_}:
        keys = list(zip(map(type, values), values, strict=True))  # True equals 1, but for its type
    try:
        text = {k: _text(v) for k, v in dict(zip(keys, values, strict=True)).items()}
    except TypeError as error:
        raise TypeError(_no_value(name, error)) from None
    return [text[key] for key in keys]


def _values(column: Any) -> list[Any]:
    return list(column.tolist() if isinstance(column, np.ndarray) else column.to_list())


def _no_value(name: str, error: TypeError) -> str:
    return (
        f"a value of column {name!r} is no category: argument must be a string or a number: {error}"
    )


def _text(value: Any) -> str | None:
    if _is_missing(value) or value in ("", b""):
        return None
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    if isinstance(value, (str, int, float, np.number)):
        return str(value)
    raise TypeError(f"{type(value).__name__}")


def _floats(name: str, frame: Frame) -> Numbers:
    column = frame.column(name)
    if hasattr(column, "to_list"):
        column = column.to_numpy()
    if column.dtype.kind in "mM":
        raise TypeError(_no_times(name, str(column.dtype)))
    try:
        if column.dtype == object:
            column = [np.nan if _is_missing(value) else value for value in column.tolist()]
        numbers = np.asarray(column, dtype=np.float64)
        if numbers.ndim > 1:
            raise ValueError(f"values of shape {numbers.shape[1:]}")
        return numbers
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"column {name!r} held numbers in fit, and now something else "
            f"(argument must be a string or a number): {error}"
        ) from None
