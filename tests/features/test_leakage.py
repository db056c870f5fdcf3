"""Nothing of the future reaches a sample: not in histories, counters, encoders or negatives."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hashtab.features.dataset import Dataset
from hashtab.features.schema import Schema
from tests.features import logs, prepared

PLACES = ["shop", "feed"]


@pytest.fixture(params=PLACES)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def test_the_last_visible_behaviour_is_strictly_earlier_than_the_request(folder: Path) -> None:
    histories = prepared.histories(folder)
    times = {user: part["time"].to_numpy() for (user,), part in histories.group_by("user")}
    touching = 0
    for split in Dataset.open(folder).manifest.splits:
        for row in prepared.samples(folder, split).iter_rows(named=True):
            mine = times.get(row["user"], np.empty(0, np.int64))
            end = row["history_end"]
            assert (mine[:end] < row["time"]).all()
            assert (mine[end:] >= row["time"]).all()
            touching += bool((mine == row["time"]).any())
    assert touching  # the logs do hold behaviours in the very second of a request


def test_nothing_of_the_same_basket_is_visible(shop: Path, shop_schema: Schema) -> None:
    log = pl.read_parquet(str(shop_schema.log.files)).with_columns(time=pl.col("at").dt.epoch("us"))
    bought = log.group_by("household", "product").agg("time")
    samples = prepared.samples(shop, "train").filter(label=1)
    joined = samples.join(
        bought, left_on=["user", "item"], right_on=["household", "product"], suffix="s"
    )
    before = joined.select(
        pl.col("times").list.eval(pl.element()).alias("times"), "time", "item_count"
    )
    for times, time, count in before.iter_rows():
        assert count == sum(t < time for t in times)


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**16), delete=st.booleans())
def test_the_future_changes_nothing_that_was_learned_or_seen_in_training(
    seed: int, delete: bool, shop: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("future")
    schema = logs.shop(place)
    log = pl.read_parquet(place / "purchases.parquet")
    past, future = log.filter(pl.col("week") <= 6), log.filter(pl.col("week") > 6)
    rng = np.random.default_rng(seed)
    if delete:
        future = future.filter(pl.Series(rng.random(future.height) < 0.5))
    else:
        future = future.with_columns(pl.Series("product", rng.permutation(future["product"])))
    pl.concat([past, future]).write_parquet(place / "purchases.parquet")
    changed = prepared.build(schema, place / "out")
    assert prepared.samples(changed, "train").equals(prepared.samples(shop, "train"))
    encoders = "tables/encoders.json"
    assert (changed / encoders).read_bytes() == (shop / encoders).read_bytes()
    assert prepared.catalogue(changed).equals(prepared.catalogue(shop))


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(moment=st.floats(0.75, 0.98), seed=st.integers(0, 2**16))
def test_what_comes_after_a_request_changes_none_of_its_features(
    moment: float, seed: int, feed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("after")
    schema = logs.feed(place)
    log = pl.read_parquet(place / "watches.parquet")
    cut = int(np.quantile(log["ms"].to_numpy(), moment))
    past, future = log.filter(pl.col("ms") <= cut), log.filter(pl.col("ms") > cut)
    videos = np.random.default_rng(seed).permutation(future["video"])
    pl.concat([past, future.with_columns(pl.Series("video", videos))]).write_parquet(
        place / "watches.parquet"
    )
    changed = prepared.build(schema, place / "out")
    for split in ("train", "validation", "test"):
        before = [
            prepared.samples(path, split).filter(pl.col("time") <= cut * 1000)
            for path in (changed, feed)
        ]
        assert before[0].equals(before[1])


def test_items_new_after_training_are_unknown_but_keep_their_features(shop: Path) -> None:
    catalogue = prepared.catalogue(shop)
    new = catalogue.filter(pl.col("_item") >= (logs.ITEMS - 4) * 7)
    assert new.height == 4
    assert (new["product"] == 1).all()
    assert (new["_train_count"] == 0).all()
    assert (new["kind"] > 1).any()
