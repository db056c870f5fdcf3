"""A labelled table from CSV or Parquet: features, target, task, and the rows that are held out."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from hashtab.features.errors import DataError
from hashtab.features.plain import did_you_mean
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.table_files import NULLS, find_files, hashes, one_line, scan
from hashtab.serving.errors import RequestError
from hashtab.serving.table_manifest import Column, Values

Task = Literal["classification", "regression"]
Rows = NDArray[np.int64]

_MOST_CLASSES = 20  # that whole numbers in the target may be taken for
_FEWEST_ROWS = 10
_LATEST = 0.2  # share of rows in time order that a training validates on
_WHAT = "table"


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """Where a labelled table lies, and how it is read and split.

    In CSV a value is missing where it is empty, NA, N/A, n/a, #N/A, NaN, nan, null, NULL or ?.

    Args:
        file: CSV or Parquet file, folder of such, or glob.
        target: column to predict.
        task: classification for text, truth values and few whole numbers, else regression; auto
            chooses so.
        quantiles: of a number to predict, ascending, in place of its mean.
        drop: columns to leave out, such as row numbers and what is known only afterwards.
        categorical: columns of numbers that are categories.
        test: labelled table to test on, in place of a part of `file`.
        test_fraction: share of the rows to test on, of each class alike.
        time: column of times or ascending numbers; the latest rows are then tested on. The model
            does not read it.
    """

    file: str | None = None
    target: str | None = None
    task: Literal["auto", "classification", "regression"] = "auto"
    quantiles: tuple[float, ...] = ()
    drop: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    test: str | None = None
    test_fraction: float = 0.2
    time: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1:
            raise SettingsError(f"data.test_fraction must be in (0, 1), got {self.test_fraction}")
        ends = (0.0, *self.quantiles, 1.0)
        if any(low >= high for low, high in pairwise(ends)):
            raise SettingsError(
                f"data.quantiles must ascend between 0 and 1, got {list(self.quantiles)}"
            )


@dataclass(frozen=True)
class LabelledTable:
    """Rows with what is to be predicted of them.

    Args:
        frame: the features, as an estimator takes them.
        target: `[N]`, labels or numbers.
    """

    frame: pl.DataFrame
    target: NDArray[Any]

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: Rows) -> "LabelledTable":
        """Return some rows, in their order."""
        return LabelledTable(self.frame[rows.tolist()], self.target[rows])


@dataclass(frozen=True, kw_only=True)
class TableData:
    """What a training of tables learns from and is tested on.

    Args:
        train: rows to learn from, in time order where a time column is named.
        test: rows held out.
        task: what is predicted.
        quantiles: of the target that are predicted; none for its mean.
        labels: what the target holds.
        columns: of the features, as they are served.
        categorical: columns of numbers that are categories.
        ordered: whether the rows are in time order.
        digest: of the files and of how they were read and split.

    Raises:
        DataError: if the latest rows to learn from, on which a training validates where rows are in
            time order, have a class of their own.
    """

    train: LabelledTable
    test: LabelledTable
    task: Task
    quantiles: tuple[float, ...] = ()
    labels: Values
    columns: tuple[Column, ...]
    categorical: tuple[str, ...]
    ordered: bool
    digest: str
    said: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.ordered:
            where = "the latest rows to learn from, which a training validates on"
            check_classes(*latest(self.train), self.task, where)


def load(settings: TableSettings, seed: int) -> TableData:
    """Read a table, check it, and hold rows out.

    Args:
        settings: of the table.
        seed: of which rows are held out.

    Raises:
        SettingsError: if file or target is not named.
        DataError: naming the file or column that cannot be used, and what to do about it.
    """
    if settings.file is None or settings.target is None:
        raise SettingsError(
            "--data.file must name a CSV or Parquet file and --data.target the column to predict"
        )
    try:
        return _load(settings, settings.file, settings.target, seed)
    except RequestError as error:  # what reads requests reads tables too
        raise DataError(str(error)) from error


def _load(settings: TableSettings, file: str, target: str, seed: int) -> TableData:
    rows, said = _labelled(read_table(file, {}), target, file)
    _check_named(settings, rows.columns, file)
    task = settings.task if settings.task != "auto" else _task_of(rows[target])
    if settings.quantiles and task == "classification":
        raise DataError(
            f"--data.quantiles are of numbers, and the target {target!r} of {file} is taken for "
            "classes: give --data.task regression, or leave the quantiles out"
        )
    order = _by_time(rows, settings.time, file) if settings.time else None
    y, labels = _target(rows[target], task)
    features = _features(rows, settings, file)
    whole = LabelledTable(features, y)
    columns = served_columns(features, settings.categorical)
    if settings.test is None:
        train, test = _split(whole, task, order, settings.test_fraction, seed)
    else:
        train = whole if order is None else whole.take(order[0])
        test, more = labelled(settings.test, columns, target, task)
        said += more
    _check(train, test, task, target, file)
    return TableData(
        train=train,
        test=test,
        task=task,
        quantiles=settings.quantiles,
        labels=labels,
        columns=columns,
        categorical=settings.categorical,
        ordered=order is not None,
        digest=_digest(settings, file, task, seed),
        said=tuple(said),
    )


def labelled(
    pattern: str, columns: Sequence[Column], target: str, task: Task
) -> tuple[LabelledTable, list[str]]:
    """Read another table with the columns of a first one, and a target.

    Returns:
        The table, and what is to be said of it.

    Raises:
        DataError: if it cannot be read, or lacks one of these columns.
    """
    try:
        read = read_table(pattern, csv_types(columns))
    except RequestError as error:
        raise DataError(str(error)) from error
    rows, said = _labelled(read, target, pattern)
    for column in columns:
        if column.name not in rows.columns:
            hint = did_you_mean(column.name, rows.columns)
            raise DataError(f"{pattern} has no column {column.name!r}, which the model reads{hint}")
    frame = rows.select(as_served(column, rows.schema[column.name]) for column in columns)
    return LabelledTable(frame, _target(rows[target], task)[0]), said


def csv_types(columns: Sequence[Column]) -> dict[str, type[pl.DataType]]:
    """Return the types that a CSV does not tell rightly: "007" may be text, 5 may be 5.0."""
    types: dict[Values, type[pl.DataType]] = {"text": pl.String, "number": pl.Float64}
    return {column.name: types[column.values] for column in columns if column.values in types}


def as_served(column: Column, dtype: pl.DataType) -> pl.Expr:
    """A column of another table in the form that a model reads it in."""
    plain = _plain(column.name, dtype)
    if column.values == "boolean" and dtype == pl.String:
        return plain.str.to_lowercase()  # True, as Python writes it
    return plain


def read_table(pattern: str, types: Mapping[str, type[pl.DataType]]) -> pl.DataFrame:
    """Read CSV or Parquet files into memory; what a CSV calls missing is null.

    Args:
        pattern: that names them.
        types: that columns of a CSV are read as.

    Raises:
        RequestError: if there are none, or they cannot be read.
    """
    paths = find_files(pattern, _WHAT)
    try:
        return scan(paths, types, _WHAT, NULLS).collect()
    except pl.exceptions.PolarsError as error:
        raise RequestError(f"{_WHAT} {paths[0]} cannot be read: {one_line(error)}") from error


def _labelled(rows: pl.DataFrame, target: str, file: str) -> tuple[pl.DataFrame, list[str]]:
    """Leave out rows without a target, and say so."""
    if target not in rows.columns:
        hint = did_you_mean(target, rows.columns)
        raise DataError(f"{file} has no column {target!r} to predict{hint}; give --data.target")
    there = rows[target].is_not_null()
    if rows[target].dtype.is_float():
        there &= rows[target].is_finite().fill_null(False)
    missing = len(rows) - int(there.sum())
    said = [f"{missing:,} rows of {file} have no {target!r} and are left out"] if missing else []
    return rows.filter(there), said


def _check_named(settings: TableSettings, there: Sequence[str], file: str) -> None:
    named = [("drop", name) for name in settings.drop]
    named += [("categorical", name) for name in settings.categorical]
    named += [("time", settings.time)] if settings.time else []
    for option, name in named:
        if name not in there:
            hint = did_you_mean(name, there)
            raise DataError(f"{file} has no column {name!r}, which --data.{option} names{hint}")


def _task_of(target: pl.Series) -> Task:
    dtype = target.dtype
    if dtype.is_temporal():
        raise DataError(f"the target {target.name!r} holds {dtype}, which no model here predicts")
    if not dtype.is_numeric():
        return "classification"
    whole = dtype.is_integer() or bool((target == target.round()).all())
    return "classification" if whole and target.n_unique() <= _MOST_CLASSES else "regression"


def _target(target: pl.Series, task: Task) -> tuple[NDArray[Any], Values]:
    """Return what is predicted as an array, and what its labels are."""
    number = target.dtype.is_numeric()
    if task == "regression":
        if not number and target.dtype != pl.Boolean:
            raise DataError(
                f"the target {target.name!r} holds {target.dtype}, and a regression needs numbers: "
                "leave --data.task out, or name another --data.target"
            )
        return target.cast(pl.Float64).to_numpy(), "number"
    if target.dtype == pl.Boolean:
        return target.to_numpy(), "boolean"
    if number and (target == target.round()).all():
        return target.cast(pl.Int64).to_numpy(), "integer"
    if number:
        return target.cast(pl.Float64).to_numpy(), "number"
    return np.array(target.cast(pl.String).to_list()), "text"


def _features(rows: pl.DataFrame, settings: TableSettings, file: str) -> pl.DataFrame:
    left_out = {settings.target, settings.time, *settings.drop}
    features = rows.select(name for name in rows.columns if name not in left_out)
    if not features.width:
        raise DataError(f"{file} has no column but the target and those left out")
    for name, dtype in features.schema.items():
        if dtype.is_temporal():
            raise DataError(
                f"{file}: column {name!r} holds {dtype}: turn it into numbers that mean something "
                "for the target, such as days since an event, or leave it out with "
                f"--data.drop '[{name}]'; --data.time orders rows by it"
            )
        if dtype.is_nested() or dtype in (pl.Binary, pl.Object):
            raise DataError(
                f"{file}: column {name!r} holds {dtype}, and a table needs one number, text or "
                f"truth value a row: leave it out with --data.drop '[{name}]'"
            )
    return features.with_columns(_plain(name, dtype) for name, dtype in features.schema.items())


def _plain(name: str, dtype: pl.DataType) -> pl.Expr:
    """A column of a type that every library knows."""
    if dtype in (pl.Categorical, pl.Enum):
        return pl.col(name).cast(pl.String)
    if dtype.is_decimal() or dtype == pl.Null:
        return pl.col(name).cast(pl.Float64)
    return pl.col(name)


def served_columns(features: pl.DataFrame, categorical: Sequence[str]) -> tuple[Column, ...]:
    """Return what each column holds, as the estimators see it."""

    def values(name: str, dtype: pl.DataType) -> Values:
        if dtype == pl.Boolean:
            return "boolean"
        if not dtype.is_numeric():
            return "text"
        return "integer" if name in categorical else "number"

    return tuple(Column(name=n, values=values(n, t)) for n, t in features.schema.items())


def _by_time(rows: pl.DataFrame, time: str, file: str) -> tuple[Rows, NDArray[Any]]:
    """Return the rows in time order, and their times."""
    times = rows[time]
    if not (times.dtype.is_temporal() or times.dtype.is_numeric()):
        raise DataError(
            f"{file}: --data.time {time!r} must hold times or numbers, got {times.dtype}"
        )
    missing = (times.fill_nan(None) if times.dtype.is_float() else times).null_count()
    if missing:
        raise DataError(
            f"{file}: {missing:,} rows have no {time!r}, which --data.time orders them by: give "
            "them a time, or leave them out of the file"
        )
    values = times.to_physical().to_numpy()
    order = np.argsort(values, kind="stable")
    return order, values[order]


def _split(
    table: LabelledTable,
    task: Task,
    order: tuple[Rows, NDArray[Any]] | None,
    fraction: float,
    seed: int,
) -> tuple[LabelledTable, LabelledTable]:
    if order is not None:
        rows, times = order
        first = times[min(len(rows) - 1, round(len(rows) * (1 - fraction)))]
        return table.take(rows[times < first]), table.take(rows[times >= first])
    held_out = held_out_rows(table.target, task, fraction, seed)
    return table.take(np.flatnonzero(~held_out)), table.take(np.flatnonzero(held_out))


def held_out_rows(
    target: NDArray[Any], task: Task, fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Return a mask of the rows to hold out: a share of all, and of each class alike."""
    random = np.random.default_rng(seed)
    mask = np.zeros(len(target), bool)
    classes = np.unique(target) if task == "classification" else [None]
    for label in classes:
        rows = np.arange(len(target)) if label is None else np.flatnonzero(target == label)
        mask[random.permutation(rows)[: round(len(rows) * fraction)]] = True
    return mask


def latest(table: LabelledTable) -> tuple[LabelledTable, LabelledTable]:
    """Cut a table in time order in two, the latest rows apart."""
    first = max(1, round(len(table) * (1 - _LATEST)))
    rows = np.arange(len(table))
    return table.take(rows[:first]), table.take(rows[first:])


def spread(rows: int, count: int) -> Rows:
    """Return the numbers of `count` rows, evenly spaced over all; some twice if there are fewer."""
    return np.linspace(0, rows - 1, count).round().astype(np.int64)


def check_classes(learnt: LabelledTable, others: LabelledTable, task: Task, where: str) -> None:
    """Refuse classes that a model would meet without having learnt them.

    Args:
        learnt: rows that it learns from.
        others: rows that it is held against.
        task: of the table.
        where: the others are, in words.

    Raises:
        DataError: naming the classes.
    """
    unknown = sorted(set(others.target.tolist()) - set(learnt.target.tolist()))
    if task == "classification" and unknown:
        raise DataError(
            f"classes {unknown[:5]} of the target come only in {where}: leave their rows out, give "
            "more rows, or leave --data.time and --data.test out, so that rows of each class are "
            "held out alike"
        )


def _check(train: LabelledTable, test: LabelledTable, task: Task, target: str, file: str) -> None:
    values = np.unique(train.target)
    if task == "classification" and len(train) > 1 and len(values) > len(train) / 2:
        raise DataError(
            f"the target {target!r} of {file} has {len(values):,} classes in {len(train):,} rows; "
            "for a number give --data.task regression, or name another --data.target"
        )
    if len(train) + len(test) < _FEWEST_ROWS or not len(test) or not len(train):
        raise DataError(
            f"{file} holds {len(train)} rows to learn from and {len(test)} to test on, too few; "
            "give more rows, or another --data.test_fraction"
        )
    if len(values) < 2:
        raise DataError(
            f"the target {target!r} of {file} is {values[0]} in all {len(train):,} rows to learn "
            "from: there is nothing to predict; check --data.target"
        )
    check_classes(train, test, task, "the rows to test on")


def _digest(settings: TableSettings, file: str, task: Task, seed: int) -> str:
    """Digest the content of the files and all that decides what is made of it."""
    patterns = [pattern for pattern in (file, settings.test) if pattern is not None]
    parts = [[part.sha256 for part in hashes(find_files(p, _WHAT))] for p in patterns]
    how = (
        settings.target,
        task,
        settings.quantiles,
        sorted(settings.drop),
        sorted(settings.categorical),
    )
    split = (settings.test is None, settings.test_fraction, settings.time, seed)
    return hashlib.sha256(repr((parts, how, split)).encode()).hexdigest()
