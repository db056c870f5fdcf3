"""Declared files as lazy frames with fixed column names, whatever the log calls them."""

import hashlib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl

from hashtab.features.errors import DataError
from hashtab.features.plain import did_you_mean
from hashtab.features.schema import Behaviours, Exposures, Items, Pool, Schema, Split, Table

USER, ITEM, TIME, LABEL = "_user", "_item", "_time", "_label"
SESSION, PERIOD, SPLIT, EVENT = "_session", "_period", "_split", "_event"

MICROSECONDS = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
_HASH_BLOCK_BYTES = 1 << 22
_PARQUET, _CSV = (".parquet", ".pq"), (".csv", ".csv.gz")
_FORMS = (*_PARQUET, *_CSV)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One input file as the manifest records it.

    Args:
        path: as found through the schema.
        size: in bytes.
        sha256: of its content.
    """

    path: str
    size: int
    sha256: str


def paths(table: Table, role: str) -> list[Path]:
    """Return the files of a table in sorted order.

    Raises:
        DataError: if a path or glob matches nothing, or a file is empty.
    """
    found: set[Path] = set()
    for pattern in table.patterns:
        matches = _matches(Path(pattern))
        if not matches:
            raise DataError(f"{role}: no file matches {pattern!r}; check `files` of the schema")
        found.update(matches)
    for path in found:
        if path.stat().st_size == 0:
            raise DataError(f"{role}: file {path} is empty; remove it or write it again")
    return sorted(found)


def _matches(pattern: Path) -> list[Path]:
    if pattern.exists():
        return _files(pattern)
    anchor = Path(pattern.anchor) if pattern.is_absolute() else Path()
    found = sorted(anchor.glob(str(pattern.relative_to(pattern.anchor))))
    return [file for path in found for file in _files(path)]


def _files(path: Path) -> list[Path]:
    """Return a file, or the tables within a folder such as Spark writes."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.rglob("[!._]*")) if file.name.lower().endswith(_FORMS)]


def hash_files(schema: Schema) -> tuple[SourceFile, ...]:
    """Hash every input file of a schema."""
    every = {path for role, table in schema.tables.items() for path in paths(table, role)}
    return tuple(
        SourceFile(path=str(path), size=path.stat().st_size, sha256=sha256(path))
        for path in sorted(every)
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def parts(table: Table, role: str, numeric: tuple[str, ...] = ()) -> list[tuple[str, pl.LazyFrame]]:
    """Return a table's files as (name, lazy frame), or the one frame that its reader makes.

    Args:
        table: declared.
        role: of the table, for errors.
        numeric: columns that hold numbers, also where a CSV file begins with whole ones.
    """
    files = paths(table, role)
    if table.reader is None:
        return [(str(path), _scan_file(path, numeric)) for path in files]
    module, _, function = table.reader.partition(":")
    try:
        read = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{role}: reader {table.reader!r} cannot be imported: {error}") from error
    frame = read(files)
    if not isinstance(frame, pl.LazyFrame):
        raise DataError(
            f"{role}: reader {table.reader!r} must return a polars.LazyFrame, "
            f"got {type(frame).__name__}"
        )
    return [(table.reader, frame)]


def _scan_file(path: Path, numeric: tuple[str, ...]) -> pl.LazyFrame:
    name = path.name.lower()
    if name.endswith(_PARQUET):
        return pl.scan_parquet(path)
    if name.endswith(_CSV):
        return pl.scan_csv(
            path,
            try_parse_dates=True,
            infer_schema_length=10_000,
            schema_overrides=dict.fromkeys(numeric, pl.Float64),
        )
    raise DataError(f"file {path} is neither CSV (.csv, .csv.gz) nor Parquet (.parquet)")


def column_types(
    frame: pl.LazyFrame, name: str, columns: Iterable[tuple[str, str]]
) -> dict[str, pl.DataType]:
    """Return the types of declared columns, given as (role, column).

    Raises:
        DataError: if the file cannot be read or a column is missing, with the nearest name.
    """
    try:
        schema = frame.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"file {name} cannot be read: {first}") from error
    for role, column in columns:
        if column not in schema:
            hint = did_you_mean(column, schema.names())
            raise DataError(f"file {name} has no column {column!r} (role {role}){hint}")
    return {column: schema[column] for _, column in columns}


def key(column: str, dtype: pl.DataType) -> pl.Expr:
    """A user, item or session column in its stored form: Int64 or String."""
    return pl.col(column).cast(pl.Int64 if _fits_int64(dtype) else pl.String)


def widened(column: str, dtype: pl.DataType) -> pl.Expr:
    """A column of the one type that its kind has, whatever width or encoding a file chose."""
    if _fits_int64(dtype):
        return pl.col(column).cast(pl.Int64)
    if dtype.is_numeric() and dtype != pl.UInt64:
        return pl.col(column).cast(pl.Float64)
    return pl.col(column) if dtype.is_temporal() or dtype == pl.Boolean else key(column, dtype)


def _fits_int64(dtype: pl.DataType) -> bool:
    """Hashes as UInt64 do not: they are kept as text."""
    return dtype.is_integer() and dtype != pl.UInt64


def microseconds(column: str, dtype: pl.DataType, unit: str | None) -> pl.Expr:
    """A time column as Int64 microseconds since 1970 UTC."""
    if dtype == pl.Date:
        return pl.col(column).cast(pl.Datetime("us")).dt.epoch("us")
    if isinstance(dtype, pl.Datetime):
        return pl.col(column).dt.epoch("us")
    factor = MICROSECONDS[unit or "s"]
    if dtype.is_integer():
        whole = pl.col(column).cast(pl.Int64)
        return whole * int(factor) if factor >= 1 else whole // 1000
    return (pl.col(column) * factor).round().cast(pl.Int64, strict=False)


def split_ends(split: Split) -> tuple[int, int]:
    """Return the last values of training and validation: of the column, or microseconds (UTC)."""
    if split.column is not None:
        return int(split.train_until), int(split.validate_until)
    ends = _last_instant(split.train_until), _last_instant(split.validate_until)
    if ends[0] >= ends[1]:
        raise DataError(
            f"split: train_until must be before validate_until, "
            f"got {split.train_until!r} and {split.validate_until!r}"
        )
    return ends


def _last_instant(value: int | str) -> int:
    text = str(value)
    try:
        if len(text) == len("2024-01-31"):
            day = datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
            return _epoch_microseconds(day + timedelta(days=1)) - 1
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise DataError(f"split: {text!r} is not a date or time such as '2024-01-31'") from error
    return _epoch_microseconds(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def _epoch_microseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def split_index(schema: Schema, time: pl.Expr) -> pl.Expr:
    """0 for training, 1 for validation, 2 for test rows."""
    train_end, validation_end = split_ends(schema.split)
    column = schema.split.column
    value = time if column is None else pl.col(column).cast(pl.Int64)
    return (value > train_end).cast(pl.Int8) + (value > validation_end).cast(pl.Int8)


def log_columns(schema: Schema, log: Behaviours | Exposures) -> list[tuple[str, str]]:
    """Every column that the schema names in a log, as (role, column)."""
    columns = [("user", log.user), ("item", log.item), ("time", log.time)]
    if isinstance(log, Exposures):
        columns.append(("label", log.label))
    else:
        columns += [("session", log.session)] if log.session else []
        columns += [("feature", name) for name in (*log.categorical, *log.numeric)]
    if requests_log(schema) is log:
        columns += [("context", name) for name in schema.context.categorical]
        columns += [("context", name) for name in schema.context.numeric]
    if schema.exposures is None:
        columns += [("once_per", schema.once_per)] if schema.once_per else []
        columns += [("on", name) for name in schema.pool.on] if schema.pool else []
    columns += [("split", schema.split.column)] if schema.split.column else []
    return columns


def numeric_columns(schema: Schema, log: Behaviours | Exposures) -> tuple[str, ...]:
    """Columns of a log that hold numeric features."""
    side = log.numeric if isinstance(log, Behaviours) else ()
    return (*side, *(schema.context.numeric if requests_log(schema) is log else ()))


def requests_log(schema: Schema) -> Behaviours | Exposures:
    """The log whose rows become samples."""
    return schema.exposures or schema.log


def read_log(schema: Schema, log: Behaviours | Exposures) -> pl.LazyFrame:
    """Return a log with the fixed names of this module; features keep their own names.

    Columns: `_user`, `_item` (Int64 or String), `_time` (Int64 microseconds), `_split` (0, 1, 2),
    where declared `_label`, `_session`, `_period`, and side features, context and pool keys; and
    `_event`, a hash of the whole row, also of columns that the schema does not name: rows that
    agree in all of them are one event, delivered twice.
    """
    role = "exposures" if isinstance(log, Exposures) else "behaviours"
    columns = log_columns(schema, log)
    frames = [
        _canonical(schema, log, frame, column_types(frame, name, columns))
        for name, frame in parts(log, role, numeric_columns(schema, log))
    ]
    return pl.concat(frames)


def _canonical(
    schema: Schema, log: Behaviours | Exposures, frame: pl.LazyFrame, types: dict[str, pl.DataType]
) -> pl.LazyFrame:
    time = microseconds(log.time, types[log.time], log.time_unit)
    chosen = {
        USER: key(log.user, types[log.user]),
        ITEM: key(log.item, types[log.item]),
        TIME: time,
        SPLIT: split_index(schema, time),
        EVENT: _row_hash(frame),
    }
    if isinstance(log, Exposures):
        chosen[LABEL] = pl.col(log.label).cast(pl.Int8)
    elif log.session is not None:
        chosen[SESSION] = key(log.session, types[log.session])
    if schema.once_per is not None:
        chosen[PERIOD] = widened(schema.once_per, types[schema.once_per])
    for feature_role, name in log_columns(schema, log):
        if feature_role in ("feature", "context", "on"):
            chosen[name] = widened(name, types[name])
    return frame.select(**chosen)


def _row_hash(frame: pl.LazyFrame) -> pl.Expr:
    return pl.struct(n for n, t in frame.collect_schema().items() if not t.is_nested()).hash()


def behaviours(schema: Schema) -> pl.LazyFrame:
    """The log of histories; exposures with a response where no behaviours are declared."""
    if schema.behaviours is not None:
        return read_log(schema, schema.behaviours)
    assert schema.exposures is not None  # checked by the schema
    return read_log(schema, schema.exposures).filter(pl.col(LABEL) == 1).drop(LABEL)


def items(schema: Schema) -> pl.LazyFrame | None:
    """Item features with the item as `_item`; None where none are declared."""
    if schema.items is None:
        return None
    features = [("feature", n) for n in (*schema.items.categorical, *schema.items.numeric)]
    return _read_keyed(schema.items, "items", schema.items.item, features)


def pool(declared: Pool) -> pl.LazyFrame:
    """What could have been shown: `_item`, the `on` columns and the context features."""
    columns = [("on", name) for name in declared.on]
    columns += [("feature", name) for name in (*declared.categorical, *declared.numeric)]
    return _read_keyed(declared, "pool", declared.item, columns)


def _read_keyed(
    table: Items | Pool, role: str, item: str, columns: list[tuple[str, str]]
) -> pl.LazyFrame:
    frames = []
    for name, frame in parts(table, role, table.numeric):
        types = column_types(frame, name, [("item", item), *columns])
        rest = [widened(column, types[column]) for _, column in columns]
        frames.append(frame.select(key(item, types[item]).alias(ITEM), *rest))
    return pl.concat(frames)
