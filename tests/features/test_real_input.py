"""Input as people have it: several files and forms, odd types and names, repeats, sessions."""

import dataclasses
import fcntl
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError
from hashtab.features.prepare import prepare
from hashtab.features.schema import Context, Exposures, Schema, Split
from tests.features import logs, prepared


@pytest.fixture
def schema(tmp_path: Path) -> Schema:
    return logs.shop(tmp_path / "raw")


def with_log(schema: Schema, **changed: Any) -> Schema:
    assert schema.behaviours is not None
    return dataclasses.replace(schema, behaviours=dataclasses.replace(schema.behaviours, **changed))


def same_samples(one: Path, other: Path) -> bool:
    return all(
        prepared.samples(one, split).equals(prepared.samples(other, split))
        for split in Dataset.open(one).manifest.splits
    )


def test_files_of_one_table_may_differ_in_width_and_encoding(
    shop: Path, schema: Schema, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    log = pl.read_parquet(raw / "purchases.parquet")
    narrow = log.tail(-500).with_columns(
        pl.col("household", "store", "week", "product").cast(pl.Int32),
        pl.col("price").cast(pl.Decimal(10, 2)),
    )
    log.head(500).write_parquet(raw / "a.parquet")
    narrow.write_parquet(raw / "b.parquet")
    items = pl.read_parquet(raw / "items.parquet")
    items.head(9).write_parquet(raw / "items-a.parquet")
    items.tail(-9).with_columns(
        pl.col("kind").cast(pl.Categorical), pl.col("size").cast(pl.Float32)
    ).write_parquet(raw / "items-b.parquet")
    assert schema.items is not None
    table = dataclasses.replace(schema.items, files=str(raw / "items-*.parquet"))
    several = with_log(schema, files=(str(raw / "a.parquet"), str(raw / "b.parquet")))
    other = prepared.build(dataclasses.replace(several, items=table), tmp_path / "out")
    assert same_samples(other, shop)


def test_a_folder_of_parts_is_a_table(shop: Path, schema: Schema, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    log = pl.read_parquet(raw / "purchases.parquet")
    spark = raw / "purchases_spark.parquet"
    (spark / "day=1").mkdir(parents=True)
    (spark / "_SUCCESS").touch()
    log.head(500).write_parquet(spark / "part-0.parquet")
    log.tail(-500).write_parquet(spark / "day=1" / "part-1.parquet")
    other = prepared.build(with_log(schema, files=str(spark)), tmp_path / "out")
    assert same_samples(other, shop)


def test_hashes_of_64_bits_are_users(schema: Schema, tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "purchases.parquet"
    log = pl.read_parquet(raw)
    log.with_columns(pl.col("household").hash()).write_parquet(raw)
    other = prepared.build(schema, tmp_path / "out")
    assert Dataset.open(other).manifest.users == log["household"].n_unique()


def test_a_csv_column_may_hold_whole_numbers_for_long(tmp_path: Path) -> None:
    schema = logs.feed(tmp_path)
    rng = np.random.default_rng(0)
    log = logs.impressions(rng, 12_000).with_columns(
        load=pl.when(pl.int_range(pl.len()) < 11_000).then(pl.lit(3)).otherwise(pl.lit("2.5"))
    )
    log.write_csv(tmp_path / "impressions.csv")
    assert schema.exposures is not None
    csv = dataclasses.replace(schema.exposures, files=str(tmp_path / "impressions.csv"))
    other = prepared.build(dataclasses.replace(schema, exposures=csv), tmp_path / "out")
    assert len(set(prepared.samples(other, "train")["load"])) == 2


@pytest.mark.parametrize("name", ["time", "row", "label", "user", "group", "item_count", "code"])
def test_a_feature_may_have_any_name_that_does_not_begin_with_an_underscore(
    name: str, feed: Path, tmp_path: Path
) -> None:
    schema = logs.feed(tmp_path / "raw")
    raw = tmp_path / "raw" / "impressions.parquet"
    pl.read_parquet(raw).rename({"tab": name}).write_parquet(raw)
    context = Context(categorical=(name,), numeric=("load",))
    other = Dataset.open(
        prepared.build(dataclasses.replace(schema, context=context), tmp_path / "out")
    )
    for one, two in zip(other.batches("train"), Dataset.open(feed).batches("train"), strict=True):
        assert (one.context[name] == two.context["tab"]).all()
        assert (one.cuts == two.cuts).all()


@pytest.mark.parametrize(
    ("side", "context", "said"),
    [
        ({"categorical": ("_c",)}, {}, "'_c' begins with '_'"),
        ({"categorical": ("hour",)}, {"time": ("hour",)}, "'hour' is named as behaviours.cat"),
        ({"categorical": ("c",)}, {"numeric": ("c",)}, "one name has one kind"),
    ],
)
def test_a_name_has_one_meaning(
    side: dict[str, Any], context: dict[str, Any], said: str, schema: Schema
) -> None:
    schema = dataclasses.replace(schema, context=Context(**context))
    with pytest.raises(DataError, match=said):
        with_log(schema, **side)


def test_rows_that_differ_in_any_column_are_two_events(schema: Schema, tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "purchases.parquet"
    log = pl.read_parquet(raw).with_columns(quantity=pl.lit(1))
    again = log.head(40).with_columns(quantity=pl.lit(2))
    pl.concat([log, again, log.tail(30)]).write_parquet(raw)
    manifest = Dataset.open(prepared.build(schema, tmp_path / "out")).manifest
    assert manifest.behaviours == log.height + 40
    assert manifest.duplicates == {"behaviours": 30}


def test_a_session_over_a_split_is_one_request_of_its_first_time(
    schema: Schema, tmp_path: Path
) -> None:
    day = 24 * 3600 * 10**6
    split = Split(train_until="2023-02-12", validate_until="2023-02-26")
    raw = tmp_path / "raw" / "purchases.parquet"
    log = pl.read_parquet(raw)
    late = pl.int_range(pl.len()).over("basket") * pl.duration(hours=10)
    log.with_columns(pl.col("at") + late).write_parquet(raw)
    folder = prepared.build(dataclasses.replace(schema, split=split), tmp_path / "out")
    spans = [prepared.samples(folder, name)["time"] for name in ("train", "validation", "test")]
    for before, after in pairwise(spans):
        latest, earliest = before.max(), after.min()
        assert isinstance(latest, int)
        assert isinstance(earliest, int)
        assert latest // day < earliest // day


def test_one_preparation_at_a_time(schema: Schema, tmp_path: Path) -> None:
    def locked(*_: object) -> None:
        with pytest.raises(DataError, match="another process is preparing the same data"):
            prepare(schema, tmp_path / "out", shards=2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(schema, tmp_path / "out", shards=2, run_shards=locked)
    prepare(schema, tmp_path / "out", shards=2)


def test_what_killed_runs_of_other_input_left_is_removed(schema: Schema, tmp_path: Path) -> None:
    abandoned, held = tmp_path / ".out.building-1", tmp_path / ".out.building-2"
    for folder in (abandoned, held):
        folder.mkdir()
        (folder / ".lock").touch()
    with (held / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare(schema, tmp_path / "out", shards=2)
        assert sorted(path.name for path in tmp_path.iterdir()) == [held.name, "out", "raw"]


def test_an_empty_output_folder_is_filled(schema: Schema, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert Dataset.open(prepared.build(schema, tmp_path / "out")).manifest.users > 0


def test_late_errors_leave_nothing_behind_either(tmp_path: Path) -> None:
    schema = logs.feed(tmp_path / "raw")
    raw = tmp_path / "raw" / "impressions.parquet"
    test_rows = pl.from_epoch("ms", "ms") > pl.datetime(2023, 1, 25, 12)
    log = pl.read_parquet(raw)
    log.with_columns(clicked=pl.when(test_rows).then(1).otherwise("clicked")).write_parquet(raw)
    with pytest.raises(DataError, match=r"split 'test' has .* both classes"):
        prepare(schema, tmp_path / "out", shards=2)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("at", pl.col("at").dt.replace_time_zone("UTC"), "is Datetime"),
        ("store", pl.concat_list("store", "store"), "must hold single values, has type List"),
    ],
)
def test_types_that_have_no_one_meaning_are_refused(
    column: str, value: pl.Expr, said: str, schema: Schema, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    log = pl.read_parquet(raw / "purchases.parquet")
    log.head(500).write_parquet(raw / "a.parquet")
    log.tail(-500).with_columns(value.alias(column)).write_parquet(raw / "b.parquet")
    files = str(raw / "b.parquet")
    if column == "at":
        schema = with_log(schema, files=(str(raw / "a.parquet"), files))
    else:
        schema = with_log(schema, files=files)
    with pytest.raises(DataError, match=said):
        prepare(schema, tmp_path / "out", shards=2)


def test_a_column_of_two_logs_has_one_type(tmp_path: Path) -> None:
    schema = logs.feed(tmp_path)
    path = tmp_path / "watches.parquet"
    pl.read_parquet(path).with_columns(tab=pl.lit("home")).write_parquet(path)
    assert isinstance(schema.exposures, Exposures)
    with pytest.raises(DataError, match="column 'tab' of the behaviours is String"):
        prepare(with_log(schema, categorical=("tab",)), tmp_path / "out", shards=2)
