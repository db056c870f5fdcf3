"""Preparation resumes, repeats, does not depend on shards, form or order; negatives keep rules."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError
from hashtab.features.prepare import ShardTask, prepare
from hashtab.features.schema import Context, Negatives, Schema
from tests.features import logs, prepared

ROOT = Path(__file__).resolve().parents[2]


def test_a_second_run_changes_nothing(shop: Path, shop_schema: Schema) -> None:
    before = {path: path.stat().st_mtime_ns for path in shop.rglob("*")}
    again = prepare(shop_schema, shop, shards=3)
    assert again == Dataset.open(shop, verify=True).manifest
    assert {path: path.stat().st_mtime_ns for path in shop.rglob("*")} == before


def test_data_of_another_schema_is_not_overwritten(shop: Path, shop_schema: Schema) -> None:
    other = dataclasses.replace(shop_schema, context=Context())
    with pytest.raises(DataError, match="already holds data of another schema"):
        prepare(other, shop, shards=3)


@pytest.mark.parametrize("renames", [1, 5, 12])
def test_a_killed_run_resumes_to_the_same_bytes(
    renames: int, shop: Path, shop_schema: Schema, tmp_path: Path
) -> None:
    """Killed just before the n-th file gets its name, with its temporary file in place."""
    code = f"""
import os, signal
from pathlib import Path
from hashtab.features.prepare import ShardTask, prepare
from tests.features.logs import shop_schema
rename, left = Path.replace, [{renames}]
def replace(self, target):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.replace = replace
prepare(shop_schema(Path({str(Path(str(shop_schema.log.files)).parent)!r})), Path("out"), shards=3)
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert killed.returncode == -9
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="holds no finished data set"):
        Dataset.open(next(tmp_path.glob(".out.building-*")))
    prepare(shop_schema, tmp_path / "out", shards=3)
    assert prepared.tree(tmp_path / "out") == prepared.tree(shop)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("shards", [1, 7, 40])
def test_the_number_of_shards_changes_no_sample(
    shards: int, shop: Path, shop_schema: Schema, tmp_path: Path
) -> None:
    other = prepared.build(shop_schema, tmp_path / "out", shards)
    for split in Dataset.open(shop).manifest.splits:
        assert prepared.samples(other, split).equals(prepared.samples(shop, split))
    assert prepared.catalogue(other).equals(prepared.catalogue(shop))


def test_shards_may_run_in_any_order(shop: Path, shop_schema: Schema, tmp_path: Path) -> None:
    def backwards(task: ShardTask, shards: Iterable[int]) -> None:
        for shard in reversed(list(shards)):
            task(shard)

    prepare(shop_schema, tmp_path / "out", shards=3, run_shards=backwards)
    assert prepared.tree(tmp_path / "out") == prepared.tree(shop)


@pytest.mark.parametrize("form", ["csv", "many", "shuffled", "doubled"])
def test_form_and_order_of_the_input_change_no_sample(
    form: str, shop: Path, tmp_path: Path
) -> None:
    schema = logs.shop(tmp_path)
    assert schema.behaviours is not None
    log = pl.read_parquet(tmp_path / "purchases.parquet")
    if form == "csv":
        log.write_csv(tmp_path / "purchases.csv")
        files: tuple[str, ...] = (str(tmp_path / "purchases.csv"),)
    elif form == "many":
        for i in range(3):
            log.slice(i * 400, 400 if i < 2 else None).write_parquet(tmp_path / f"part-{i}.parquet")
        files = (str(tmp_path / "part-*.parquet"),)
    else:
        log = log.sample(fraction=1.0, shuffle=True, seed=1)
        twice = pl.concat([log, log.head(50)]) if form == "doubled" else log
        twice.write_parquet(tmp_path / "purchases.parquet")
        files = (str(tmp_path / "purchases.parquet"),)
    schema = dataclasses.replace(
        schema, behaviours=dataclasses.replace(schema.behaviours, files=files)
    )
    other = prepared.build(schema, tmp_path / "out")
    for split in Dataset.open(shop).manifest.splits:
        assert prepared.samples(other, split).equals(prepared.samples(shop, split))
    assert prepared.histories(other).equals(prepared.histories(shop))
    assert Dataset.open(other).manifest.duplicates["behaviours"] == (50 if form == "doubled" else 0)


def test_positives_are_the_first_purchases_of_promoted_known_products(
    shop: Path, shop_schema: Schema
) -> None:
    """The exposure rule once more, by polars joins."""
    folder = Path(str(shop_schema.log.files)).parent
    log = pl.read_parquet(folder / "purchases.parquet")
    pool = pl.read_parquet(folder / "promotions.parquet").unique(["product", "store", "week"])
    known = log.filter(pl.col("week") <= 6).select("product").unique()
    starts = log.group_by("household", "basket").agg(pl.col("at").min().alias("start"))
    first = (
        log.join(starts, on=["household", "basket"])
        .sort("household", "product", "start", "basket")
        .unique(["household", "week", "product"], keep="first", maintain_order=True)
    )
    expected = first.join(pool, on=["product", "store", "week"]).join(known, on="product")
    for split, low, high in (("train", 1, 6), ("validation", 7, 8), ("test", 9, 10)):
        found = prepared.samples(shop, split).filter(label=1)
        wanted = expected.filter(pl.col("week").is_between(low, high))
        pairs = [
            found.select("user", "item", "time").sort("user", "item", "time").rows(),
            wanted.select("household", "product", pl.col("start").dt.epoch("us"))
            .sort("household", "product", "start")
            .rows(),
        ]
        assert pairs[0] == pairs[1]
        assert len(pairs[0]) > 20


@pytest.mark.parametrize("split", ["train", "test", "test_uniform"])
def test_negatives_were_on_offer_and_not_bought_that_week(
    split: str, shop: Path, shop_schema: Schema
) -> None:
    folder = Path(str(shop_schema.log.files)).parent
    log = pl.read_parquet(folder / "purchases.parquet")
    week = (pl.from_epoch("time", "us") - logs.START).dt.total_days() // 7 + 1
    negatives = prepared.samples(shop, split).filter(label=0).with_columns(week=week)
    bought = negatives.join(
        log, left_on=["user", "item", "week"], right_on=["household", "product", "week"]
    )
    assert not bought.height
    stores = log.group_by("household", "basket").agg(
        pl.col("at").min().dt.epoch("us").alias("time"), pl.col("store").first()
    )
    offered = negatives.join(stores, left_on=["user", "time"], right_on=["household", "time"]).join(
        pl.read_parquet(folder / "promotions.parquet").unique(["product", "store", "week"]),
        left_on=["item", "store", "week"],
        right_on=["product", "store", "week"],
    )
    assert offered.height == negatives.height
    info = Dataset.open(shop).manifest.splits[split]
    per_positive = 2 if split == "test_uniform" else 3
    assert info.samples == info.positives * (1 + per_positive)


def test_matched_negatives_are_as_popular_as_positives_and_uniform_ones_are_not(
    shop: Path,
) -> None:
    catalogue = prepared.catalogue(shop)
    count = catalogue.select(item="_item", count="_train_count")

    def popularity(split: str, label: int) -> float:
        chosen = prepared.samples(shop, split).filter(pl.col("label") == label)
        return float(np.mean(chosen.join(count, on="item")["count"].to_numpy()))

    positive, matched = popularity("test", 1), popularity("test", 0)
    uniform = popularity("test_uniform", 0)
    assert abs(matched - positive) < 0.5 * abs(uniform - positive)


def test_popularity_counts_training_weeks_only(shop: Path, shop_schema: Schema) -> None:
    log = pl.read_parquet(str(shop_schema.log.files)).filter(pl.col("week") <= 6)
    counts = dict(log.group_by("product").len().iter_rows())
    for item, count in prepared.catalogue(shop).select("_item", "_train_count").iter_rows():
        assert count == counts.get(item, 0)


def test_another_seed_draws_other_negatives_and_the_same_positives(
    shop: Path, shop_schema: Schema, tmp_path: Path
) -> None:
    rules = (Negatives(name="matched", scheme="popularity", per_positive=3, seed=1),)
    other = prepared.build(dataclasses.replace(shop_schema, negatives=rules), tmp_path / "out")
    ours, theirs = prepared.samples(shop, "test"), prepared.samples(other, "test")
    assert theirs.filter(label=1).equals(ours.filter(label=1))
    assert not theirs.filter(label=0).equals(ours.filter(label=0))


def test_without_a_pool_negatives_are_items_seen_before_the_request(
    shop_schema: Schema, tmp_path: Path
) -> None:
    schema = dataclasses.replace(shop_schema, pool=None, once_per=None)
    folder = prepared.build(schema, tmp_path / "out")
    log = pl.read_parquet(str(shop_schema.log.files)).with_columns(pl.col("at").dt.epoch("us"))
    first = log.group_by("product").agg(pl.col("at").min().alias("first"))
    samples = prepared.samples(folder, "train")
    negatives = samples.filter(label=0).join(first, left_on="item", right_on="product")
    assert negatives.height == samples.filter(label=0).height > 0
    assert (negatives["first"] < negatives["time"]).all()


def test_clicks_alone_are_enough(feed_schema: Schema, tmp_path: Path) -> None:
    folder = prepared.build(logs.clicks_only(feed_schema), tmp_path / "out")
    clicks = pl.read_parquet(str(feed_schema.tables["exposures"].files)).filter(clicked=1)
    once = clicks.select("who", "video", "ms").unique()
    assert Dataset.open(folder).manifest.behaviours <= clicks.height
    assert prepared.histories(folder).select("user", "item").n_unique() == (
        once.select("who", "video").n_unique()
    )


def test_context_of_exposures_is_encoded_on_training_rows(feed: Path, feed_schema: Schema) -> None:
    log = pl.read_parquet(str(feed_schema.tables["exposures"].files))
    train = log.filter(pl.from_epoch("ms", "ms") < pl.datetime(2023, 1, 21))
    mean, std = train["load"].mean(), train["load"].std(ddof=0)
    samples = prepared.samples(feed, "test")
    test = log.filter(pl.from_epoch("ms", "ms") > pl.datetime(2023, 1, 25, 12))
    expected = ((test["load"] - mean) / std).sort().to_numpy()
    np.testing.assert_allclose(samples["load"].sort().to_numpy(), expected, rtol=1e-4, atol=1e-4)
    assert set(samples["tab"].to_list()) == {2, 3, 4}


def test_a_full_disk_is_said_and_resumed(
    shop: Path, shop_schema: Schema, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.replace
    left = [8]

    def fill(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fill)
        with pytest.raises(DataError, match=r"disk that holds .* is full.*resumed"):
            prepare(shop_schema, tmp_path / "out", shards=3)
    prepare(shop_schema, tmp_path / "out", shards=3)
    assert prepared.tree(tmp_path / "out") == prepared.tree(shop)


def test_a_full_disk_met_by_polars_is_said(shop_schema: Schema, tiny_disk: Path) -> None:
    with pytest.raises(DataError, match="is full"):
        prepare(shop_schema, tiny_disk / "out", shards=3)
