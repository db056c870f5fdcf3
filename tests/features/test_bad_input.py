"""Bad input ends before any long work, says where and what, and leaves nothing behind."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from hashtab.features.errors import DataError
from hashtab.features.prepare import prepare
from hashtab.features.schema import Behaviours, Negatives, Schema, Split
from tests.features import logs


def refused(schema: Schema, tmp_path: Path, *said: str) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError) as error:
        prepare(schema, tmp_path / "out", shards=2)
    message = str(error.value)
    assert "\n" not in message
    for part in said:
        assert part in message, message
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def change(path: Path, *columns: pl.Expr) -> None:
    pl.read_parquet(path).with_columns(*columns).write_parquet(path)


def at_row(row: int, column: str, value: Any) -> pl.Expr:
    """The column with another value in one row, counted from 1."""
    here = pl.int_range(pl.len()) == row - 1
    return pl.when(here).then(pl.lit(value)).otherwise(pl.col(column)).alias(column)


@pytest.fixture
def shop(tmp_path: Path) -> Schema:
    return logs.shop(tmp_path)


@pytest.fixture
def feed(tmp_path: Path) -> Schema:
    return logs.feed(tmp_path)


def test_a_missing_column_names_the_nearest(shop: Schema, tmp_path: Path) -> None:
    path = tmp_path / "purchases.parquet"
    pl.read_parquet(path).rename({"household": "houshold"}).write_parquet(path)
    refused(shop, tmp_path, "purchases.parquet", "'household'", "did you mean 'houshold'?")


@pytest.mark.parametrize(
    ("file", "column", "role"),
    [("items.parquet", "kind", "feature"), ("promotions.parquet", "store", "on")],
)
def test_a_missing_column_of_other_tables(
    file: str, column: str, role: str, shop: Schema, tmp_path: Path
) -> None:
    path = tmp_path / file
    pl.read_parquet(path).drop(column).write_parquet(path)
    refused(shop, tmp_path, file, repr(column), f"role {role}")


@pytest.mark.parametrize("column", ["household", "product", "at", "basket", "week"])
def test_a_missing_value_names_its_row(column: str, shop: Schema, tmp_path: Path) -> None:
    change(tmp_path / "purchases.parquet", at_row(17, column, None))
    refused(shop, tmp_path, "purchases.parquet, row 17", repr(column), "is missing")


@pytest.mark.parametrize("column", ["household", "product"])
def test_nan_keys_are_missing_and_float_keys_of_a_wrong_type(
    column: str, shop: Schema, tmp_path: Path
) -> None:
    path = tmp_path / "purchases.parquet"
    change(path, pl.col(column).cast(pl.Float64))
    refused(shop, tmp_path, repr(column), "row 1", "floating-point", "integers or strings")
    change(path, at_row(23, column, float("nan")))
    refused(shop, tmp_path, "row 23", repr(column), "is missing (NaN)")


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("at", "yesterday", "must hold times or numbers, has type String"),
        ("price", "cheap", "must hold numbers, has type String"),
        ("week", 1.5, "must hold integers, has type Float64"),
        ("household", True, "must hold integers or strings, has type Boolean"),
    ],
)
def test_a_wrong_type(column: str, value: object, said: str, shop: Schema, tmp_path: Path) -> None:
    change(tmp_path / "purchases.parquet", pl.lit(value).alias(column))
    refused(shop, tmp_path, "purchases.parquet", repr(column), said)


def test_a_number_as_time_needs_a_unit(shop: Schema, tmp_path: Path) -> None:
    change(tmp_path / "purchases.parquet", pl.col("at").dt.epoch("s"))
    refused(shop, tmp_path, "'at'", "time_unit is one of s, ms, us, ns")


def test_mixed_time_units_name_row_and_unit(feed: Schema, tmp_path: Path) -> None:
    change(tmp_path / "impressions.parquet", at_row(9, "ms", 1_673_000_000))
    refused(feed, tmp_path, "row 9", "1673000000", "in 'ms'", "looks like 's'")
    change(tmp_path / "impressions.parquet", at_row(9, "ms", 1_673_000_000_000_000_000))
    refused(feed, tmp_path, "row 9", "looks like 'ns'")


@pytest.mark.parametrize("value", [2, -1, None])
def test_a_label_outside_0_and_1(value: int | None, feed: Schema, tmp_path: Path) -> None:
    change(tmp_path / "impressions.parquet", at_row(5, "clicked", value))
    refused(feed, tmp_path, "row 5", "'clicked'", f"must be 0 or 1, is {value}")


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_only(label: int, feed: Schema, tmp_path: Path) -> None:
    change(tmp_path / "impressions.parquet", pl.lit(label).alias("clicked"))
    refused(feed, tmp_path, f"every label in column 'clicked' is {label}", "both classes")


@pytest.mark.parametrize("content", [b"", b"household,basket,product,store,week,at,price\n"])
def test_an_empty_file(content: bytes, shop: Schema, tmp_path: Path) -> None:
    (tmp_path / "purchases.csv").write_bytes(content)
    assert shop.behaviours is not None
    log = dataclasses.replace(shop.behaviours, files=str(tmp_path / "purchases.csv"))
    refused(dataclasses.replace(shop, behaviours=log), tmp_path, "purchases.csv")


def test_no_file(shop: Schema, tmp_path: Path) -> None:
    (tmp_path / "promotions.parquet").unlink()
    refused(shop, tmp_path, "pool: no file matches", "promotions.parquet")


def test_a_file_that_is_not_parquet(shop: Schema, tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_text("product,kind")
    refused(shop, tmp_path, "items.parquet cannot be read")


def test_files_of_one_table_must_agree(shop: Schema, tmp_path: Path) -> None:
    assert shop.behaviours is not None
    log = pl.read_parquet(tmp_path / "purchases.parquet")
    log.with_columns(pl.col("household").cast(pl.String)).write_parquet(tmp_path / "q.parquet")
    both = (str(tmp_path / "purchases.parquet"), str(tmp_path / "q.parquet"))
    schema = dataclasses.replace(shop, behaviours=dataclasses.replace(shop.behaviours, files=both))
    refused(schema, tmp_path, "'household' is Int64 in", "String in", "q.parquet")


def test_keys_of_two_tables_must_agree(shop: Schema, tmp_path: Path) -> None:
    change(tmp_path / "items.parquet", pl.col("product").cast(pl.String))
    refused(shop, tmp_path, "'product'", "Int64", "String")


def test_an_item_described_twice(shop: Schema, tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    table = pl.read_parquet(path)
    pl.concat([table, table.slice(3, 1)]).write_parquet(path)
    refused(shop, tmp_path, "'product' 21 is described in 2 rows")


def test_items_that_describe_nothing_of_the_log(shop: Schema, tmp_path: Path) -> None:
    change(tmp_path / "items.parquet", pl.col("product") + 1)
    refused(shop, tmp_path, "none of the log's items is described", "'product'")


def test_no_user_with_a_history(feed: Schema, tmp_path: Path) -> None:
    change(tmp_path / "watches.parquet", pl.col("who") + "-other")
    refused(feed, tmp_path, "no user with a history", "'who'")


def test_a_split_without_rows(shop: Schema, tmp_path: Path) -> None:
    split = Split(column="week", train_until=6, validate_until=20)
    refused(dataclasses.replace(shop, split=split), tmp_path, "no row falls into test", "2023-")


def test_a_split_column_that_does_not_rise_with_time(shop: Schema, tmp_path: Path) -> None:
    change(tmp_path / "purchases.parquet", (11 - pl.col("week")).alias("week"))
    refused(shop, tmp_path, "column 'week' must rise with time")


def test_a_reader_that_cannot_be_imported(shop: Schema, tmp_path: Path) -> None:
    assert shop.behaviours is not None
    log = dataclasses.replace(shop.behaviours, reader="nowhere.at_all:read")
    refused(dataclasses.replace(shop, behaviours=log), tmp_path, "'nowhere.at_all:read'")


LOG: dict[str, Any] = {"files": "a.csv", "user": "u", "item": "i", "time": "t"}
PLAIN: dict[str, Any] = {
    "name": "mine",
    "behaviours": LOG,
    "negatives": [{"name": "drawn", "scheme": "uniform"}],
    "split": {"train_until": "2024-01-31", "validate_until": "2024-02-29"},
}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"behavior": LOG}, "no key 'behavior'; did you mean 'behaviours'?"),
        ({"behaviours": LOG | {"sesion": "s"}}, "no key 'sesion'; did you mean 'session'?"),
        ({"behaviours": LOG | {"item": "u"}}, "'u' is named twice, as user and as item"),
        ({"behaviours": LOG | {"numeric": ["t"]}}, "'t' is named twice, as time and as numeric"),
        ({"behaviours": LOG | {"time_unit": "h"}}, "time_unit must be one of ['s', 'ms'"),
        ({"behaviours": LOG | {"user": 3}}, "user must be a string, got 3"),
        ({"behaviours": {"files": "a.csv"}}, "needs the key 'user'"),
        ({"context": {"time": ["minute"]}}, "must be one of ['hour', 'weekday']"),
        ({"context": {"categorical": ["i"]}}, "'i' is named twice, as item and as context"),
        ({"counters": ["i", "i"]}, "'i' is named twice"),
        ({"behaviours": LOG | {"files": 3}}, "schema.behaviours.files must be"),
        ({"counters": ["colour"]}, "counters must be the item column"),
        ({"negatives": []}, "needs negatives"),
        ({"negatives": [{"name": "a", "scheme": "hard"}]}, "scheme must be one of"),
        ({"negatives": [{"name": "a", "scheme": "uniform", "seed": -1}]}, "seed must not be"),
        ({"exposures": LOG | {"label": "y"}}, "leave out negatives"),
        ({"split": {"train_until": 3, "validate_until": 4}}, "must be an integer with a column"),
        ({"name": "a/b"}, "name must be letters"),
    ],
)
def test_a_wrong_schema_is_refused_when_it_is_read(
    edit: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(PLAIN | edit))
    with pytest.raises(DataError) as error:
        Schema.from_yaml(path)
    assert said in str(error.value)


def test_a_schema_survives_yaml_and_finds_its_files_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    schema = Schema.from_yaml(path)
    assert schema == Schema(
        name="mine",
        behaviours=Behaviours(files=str(tmp_path / "a.csv"), user="u", item="i", time="t"),
        negatives=(Negatives(name="drawn", scheme="uniform"),),
        split=Split(train_until="2024-01-31", validate_until="2024-02-29"),
    )
    assert Schema.from_dict(schema.to_dict()) == schema


def test_dates_in_yaml_need_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(PLAIN).replace("'2024-01-31'", "2024-01-31"))
    assert Schema.from_yaml(path).split.train_until == "2024-01-31"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.exists, "cannot be read"),
        (lambda path: path.write_text("name: [a"), "is not YAML"),
        (lambda path: path.write_text("- a"), "must be a mapping"),
        (lambda path: path.write_text("name: a\nname: b"), "the key 'name' stands there twice"),
    ],
)
def test_a_schema_file_that_is_none(
    make: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    make(tmp_path / "mine.yaml")
    with pytest.raises(DataError, match=said):
        Schema.from_yaml(tmp_path / "mine.yaml")
