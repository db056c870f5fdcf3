"""Checks of the input before any long work: each error names file, column, row or value."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import polars as pl

from hashtab.features import sources
from hashtab.features.errors import DataError
from hashtab.features.schema import SPLITS, Behaviours, Exposures, Items, Pool, Schema
from hashtab.features.sources import SPLIT, TIME, USER

Types = dict[str, pl.DataType]

_EARLIEST = datetime(1980, 1, 1, tzinfo=UTC)
_LATEST = datetime(2100, 1, 1, tzinfo=UTC)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class _Rule:
    """What makes a row of a column bad, and how to say so; `{value}` is the row's value."""

    column: str
    bad: pl.Expr
    message: str


_WHOLE = ("integer", "unsigned")
_NUMBERS = (*_WHOLE, "number", "boolean")
_DATES = ("datetime", "datetime with a time zone", "date")
_SINGLE = (*_NUMBERS, *_DATES, "text")


def check(schema: Schema) -> None:
    """Check all declared files.

    Raises:
        DataError: for the first thing that is wrong: a missing column, a wrong type, a missing
            user, item or time, a time outside 1980 to 2100, a label outside {0, 1}, a table
            without rows, an item described twice, types of keys that differ between tables, one
            class only, a split without rows or out of time's order, no user with a history.
    """
    types = _check_log(schema, schema.log)
    if schema.exposures is not None and schema.exposures is not schema.log:
        exposed = _check_log(schema, schema.exposures)
        _same_kind(schema.log.user, types, schema.exposures.user, exposed)
        _same_kind(schema.log.item, types, schema.exposures.item, exposed)
        for name in {*schema.side_categorical} & {*schema.context.categorical}:
            _same_kind(name, types, name, exposed)
    _check_items(schema, types)
    _check_pool(schema, types)
    _check_splits(schema)
    _check_common_users(schema)


def _check_log(schema: Schema, log: Behaviours | Exposures) -> Types:
    role = "exposures" if isinstance(log, Exposures) else "behaviours"
    columns = sources.log_columns(schema, log)
    first: tuple[str, Types] | None = None
    for name, frame in sources.parts(log, role, sources.numeric_columns(schema, log)):
        types = sources.column_types(frame, name, columns)
        first = first or (name, types)
        _same_types(first, (name, types))
        _check_types(name, log, types, schema)
        rules = _key_rules([log.user, log.item], types)
        if isinstance(log, Behaviours) and log.session is not None:
            rules += _key_rules([log.session], types)
        rules += _time_rules(log, types)
        if isinstance(log, Exposures):
            rules.append(_label_rule(log.label))
        rules += [_null_rule(column) for column in _integer_columns(schema)]
        _check_rows(name, frame, rules, list(types))
    if isinstance(log, Exposures):
        _check_classes(log)
    assert first is not None  # `paths` found at least one file
    return first[1]


def _integer_columns(schema: Schema) -> list[str]:
    return [schema.split.column] if schema.split.column is not None else []


def _same_types(first: tuple[str, Types], other: tuple[str, Types]) -> None:
    for column, dtype in other[1].items():
        if _kind(dtype) != _kind(first[1][column]):
            raise DataError(
                f"column {column!r} is {first[1][column]} in {first[0]} and {dtype} in {other[0]}; "
                "write both files with one type"
            )


def _kind(dtype: pl.DataType) -> str:
    """Group types that mean the same to a schema."""
    if dtype == pl.UInt64:
        return "unsigned"
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        return "datetime with a time zone"
    if dtype.is_integer():
        return "integer"
    if dtype.is_float() or dtype.is_decimal():
        return "number"
    if isinstance(dtype, (pl.Categorical, pl.Enum, pl.String)):
        return "text"
    return dtype.base_type().__name__.lower()


def _check_types(name: str, log: Behaviours | Exposures, types: Types, schema: Schema) -> None:
    keys = [log.user, log.item]
    if isinstance(log, Behaviours) and log.session is not None:
        keys.append(log.session)
    for column in keys:
        # A float key is told apart below: pandas writes integers so where some are missing.
        _want(name, column, types, (*_WHOLE, "text", "number"), "integers or strings")
    if isinstance(log, Exposures):
        _want(name, log.label, types, _NUMBERS, "0 and 1")
    for column in _integer_columns(schema):
        _want(name, column, types, _WHOLE, "integers")
    _want(name, log.time, types, (*_WHOLE, "number", *_DATES), "times or numbers")
    requested = log is sources.requests_log(schema)
    categorical = schema.side_categorical if isinstance(log, Behaviours) else ()
    for column in (*categorical, *(schema.context.categorical if requested else ())):
        _want(name, column, types, _SINGLE, "single values")
    for column in sources.numeric_columns(schema, log):
        _want(name, column, types, _NUMBERS, "numbers")
    if _kind(types[log.time]) in (*_WHOLE, "number") and log.time_unit is None:
        raise DataError(
            f"file {name}: column {log.time!r} (role time) holds numbers; "
            "say their unit in the schema: time_unit is one of s, ms, us, ns"
        )


def _want(name: str, column: str, types: Types, kinds: Sequence[str], words: str) -> None:
    if _kind(types[column]) not in kinds:
        raise DataError(
            f"file {name}: column {column!r} must hold {words}, has type {types[column]}; "
            "convert it in the file"
        )


def _null_rule(column: str) -> _Rule:
    return _Rule(column, pl.col(column).is_null(), "is missing (null); drop or repair the row")


def _key_rules(columns: Sequence[str], types: Types) -> list[_Rule]:
    rules = []
    for column in columns:
        if _kind(types[column]) == "number":
            missing = pl.col(column).is_null()
            if types[column].is_float():
                missing = missing | pl.col(column).is_nan()
            rules.append(_Rule(column, missing, "is missing (NaN); drop or repair the row"))
            rules.append(
                _Rule(
                    column,
                    pl.lit(True),
                    "is a floating-point number, {value}; keys must be integers or strings, "
                    "convert the column in the file",
                )
            )
        else:
            rules.append(_null_rule(column))
    return rules


def _time_rules(log: Behaviours | Exposures, types: Types) -> list[_Rule]:
    column, dtype = log.time, types[log.time]
    missing = pl.col(column).is_null()
    if dtype.is_float():
        missing = missing | pl.col(column).is_nan()
    time = sources.microseconds(column, dtype, log.time_unit)
    low, high = (int((t - _EPOCH) / timedelta(microseconds=1)) for t in (_EARLIEST, _LATEST))
    # Compared as floats: a time in a wrong unit may not fit microseconds in 64 bits.
    if dtype.is_numeric():
        time = pl.col(column).cast(pl.Float64) * sources.MICROSECONDS[log.time_unit or "s"]
    unit = f" in {log.time_unit!r}" if dtype.is_numeric() else ""
    return [
        _Rule(column, missing, "is missing; drop or repair the row"),
        _Rule(
            column,
            (time < low) | (time >= high),
            f"is {{value}}, which{unit} is not between the years 1980 and 2100{{unit}}",
        ),
    ]


def _label_rule(column: str) -> _Rule:
    label = pl.col(column).cast(pl.Float64)
    bad = label.is_null() | ~label.is_in([0.0, 1.0])
    return _Rule(column, bad, "must be 0 or 1, is {value}")


def _check_rows(name: str, frame: pl.LazyFrame, rules: list[_Rule], columns: Sequence[str]) -> None:
    """Read all columns and apply all rules in one streaming pass.

    The row is looked for only where a rule is broken.
    """
    counts = frame.select(
        pl.len().alias("rows"),
        *(rule.bad.any().alias(str(i)) for i, rule in enumerate(rules)),
        *(pl.col(column).null_count().name.prefix("nulls_") for column in columns),
    )
    try:
        found = counts.collect(engine="streaming").row(0, named=True)
    except pl.exceptions.PolarsError as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"file {name} cannot be read: {first}") from error
    if not found["rows"]:
        raise DataError(f"file {name} has no rows; remove it or write it again")
    for i, rule in enumerate(rules):
        if found[str(i)]:
            raise DataError(_describe(name, frame, rule))


def _describe(name: str, frame: pl.LazyFrame, rule: _Rule) -> str:
    bad = frame.with_row_index("_row").filter(rule.bad).select("_row", rule.column)
    row, value = bad.head(1).collect().row(0)
    said = rule.message.format(value=value, unit=_looks_like(value))
    return f"file {name}, row {row + 1} (the first is 1): column {rule.column!r} {said}"


def _looks_like(value: object) -> str:
    if not isinstance(value, int | float):
        return ""
    for unit, microseconds in sources.MICROSECONDS.items():
        since = value * microseconds / 1e6
        if (_EARLIEST - _EPOCH).total_seconds() <= since < (_LATEST - _EPOCH).total_seconds():
            return f"; it looks like {unit!r}: times of one column must have one unit"
    return ""


def _check_classes(log: Exposures) -> None:
    frames = [
        frame.select(pl.col(log.label).cast(pl.Int8))
        for _, frame in sources.parts(log, "exposures")
    ]
    labels = pl.concat(frames).unique().collect(engine="streaming").to_series().to_list()
    if len(labels) < 2:
        raise DataError(
            f"exposures: every label in column {log.label!r} is {labels[0]}; "
            "training needs both classes"
        )


def _same_kind(
    one: str, one_types: Types, other: str, other_types: Types, table: str = "exposures"
) -> None:
    if _kind(one_types[one]) != _kind(other_types[other]):
        raise DataError(
            f"column {one!r} of the behaviours is {one_types[one]}, its counterpart {other!r} of "
            f"the {table} is {other_types[other]}; write both with one type"
        )


def _check_items(schema: Schema, log_types: Types) -> None:
    if schema.items is None:
        return
    item, categorical, numeric = (
        schema.items.item,
        schema.items.categorical,
        schema.items.numeric,
    )
    columns = [("item", item), *(("feature", name) for name in (*categorical, *numeric))]
    types = _check_keyed(schema.items, "items", columns)
    _same_kind(schema.item_name, log_types, item, types, "items")
    described = sources.items(schema)
    assert described is not None  # items are declared
    twice = described.group_by(sources.ITEM).len().filter(pl.col("len") > 1).head(1).collect()
    if twice.height:
        value, rows = twice.row(0)
        raise DataError(
            f"items: {item!r} {value!r} is described in {rows} rows; keep one row for each item"
        )
    log = sources.behaviours(schema).select(sources.ITEM).unique()
    known = log.join(described, on=sources.ITEM, how="semi").head(1).collect(engine="streaming")
    if not known.height:
        raise DataError(
            f"items: none of the log's items is described; column {schema.log.item!r} of the "
            f"behaviours and {item!r} of the items have no value in common"
        )


def _check_pool(schema: Schema, log_types: Types) -> None:
    if schema.pool is None:
        return
    features = [("feature", n) for n in (*schema.pool.categorical, *schema.pool.numeric)]
    columns = [("item", schema.pool.item), *(("on", n) for n in schema.pool.on), *features]
    types = _check_keyed(schema.pool, "pool", columns)
    _same_kind(schema.item_name, log_types, schema.pool.item, types, "pool")
    for column in schema.pool.on:
        _same_kind(column, log_types, column, types, "pool")


def _check_keyed(table: Items | Pool, role: str, columns: list[tuple[str, str]]) -> Types:
    """Check the files of a table of items; return the types of the first."""
    first: tuple[str, Types] | None = None
    for name, frame in sources.parts(table, role, table.numeric):
        types = sources.column_types(frame, name, columns)
        first = first or (name, types)
        _same_types(first, (name, types))
        for column in table.categorical:
            _want(name, column, types, _SINGLE, "single values")
        for column in table.numeric:
            _want(name, column, types, _NUMBERS, "numbers")
        _want(name, table.item, types, (*_WHOLE, "text", "number"), "integers or strings")
        _check_rows(name, frame, _key_rules([table.item], types), list(types))
    assert first is not None  # `paths` found at least one file
    return first[1]


def _check_splits(schema: Schema) -> None:
    """Every split must have rows, and a split column must rise with time."""
    log = sources.read_log(schema, sources.requests_log(schema))
    spans = (
        log.group_by(SPLIT)
        .agg(pl.col(TIME).min().alias("first"), pl.col(TIME).max().alias("last"))
        .collect(engine="streaming")
        .sort(SPLIT)
    )
    found = {split: (first, last) for split, first, last in spans.iter_rows()}
    for i, name in enumerate(SPLITS):
        if i not in found:
            ends = f"train_until={schema.split.train_until!r}"
            ends += f", validate_until={schema.split.validate_until!r}"
            times = f"{_moment(spans['first'].min())} to {_moment(spans['last'].max())}"
            raise DataError(f"split: no row falls into {name}: {ends}, the log spans {times}")
        if i and found[i][0] <= found[i - 1][1]:
            raise DataError(
                f"split: {name} begins at {_moment(found[i][0])}, before {SPLITS[i - 1]} ends at "
                f"{_moment(found[i - 1][1])}; column {schema.split.column!r} must rise with time"
            )


def _moment(microseconds: object) -> str:
    assert isinstance(microseconds, int)  # an Int64 column without nulls
    return (_EPOCH + timedelta(microseconds=microseconds)).replace(tzinfo=None).isoformat(" ")


def _check_common_users(schema: Schema) -> None:
    if schema.exposures is None:
        return
    exposed = sources.read_log(schema, schema.exposures).select(USER).unique()
    acted = sources.behaviours(schema).select(USER).unique()
    common = exposed.join(acted, on=USER, how="semi").head(1).collect(engine="streaming")
    if not common.height:
        raise DataError(
            f"no user with a history: column {schema.exposures.user!r} of the exposures and "
            f"{schema.log.user!r} of the behaviours have no value in common"
        )
