"""The known data sets: one schema each, nothing else is special about them."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hashtab.features.dataset import Dataset
from hashtab.features.datasets import complete_journey, kuairand
from hashtab.features.errors import DataError
from hashtab.features.metrics import auc
from tests.features import prepared

# Where `prepare.py --dataset kuairand` expects the real files.
KUAIRAND = Path(__file__).resolve().parents[2] / "data" / "raw" / "kuairand"


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete Journey restricted to a few households."""
    place = tmp_path_factory.mktemp("journey")
    schema = complete_journey.schema()
    assert schema.behaviours is not None
    some = pl.scan_parquet(str(schema.behaviours.files)).filter(pl.col("household_id") % 60 == 1)
    some.sink_parquet(place / "transactions.parquet")
    assert schema.pool is not None
    stores = some.select("store_id", "week").unique()
    shown = pl.scan_parquet(str(schema.pool.files)).join(stores, on=["store_id", "week"])
    shown.sink_parquet(place / "promotions.parquet")
    log = dataclasses.replace(schema.behaviours, files=str(place / "transactions.parquet"))
    pool = dataclasses.replace(schema.pool, files=str(place / "promotions.parquet"))
    return prepared.build(dataclasses.replace(schema, behaviours=log, pool=pool), place / "out")


def test_complete_journey_is_matched_by_popularity(journey: Path) -> None:
    manifest = Dataset.open(journey).manifest
    assert manifest.splits["test"].positives == manifest.splits["test_uniform"].positives > 100
    count = prepared.catalogue(journey).select(item="_item", count="_train_count")
    matched, uniform = (
        prepared.samples(journey, split).join(count, on="item")
        for split in ("test", "test_uniform")
    )
    assert auc(uniform["label"], uniform["count"]) > 0.7
    assert auc(matched["label"], matched["count"]) < 0.55


def test_complete_journey_hides_the_basket_and_what_follows(journey: Path) -> None:
    batch = next(Dataset.open(journey).batches("test", samples_per_batch=10**6))
    item = batch.behaviours["product_id"]
    for b in range(len(batch.users)):
        begin = batch.history_offsets[b]
        for i in range(batch.sample_offsets[b], batch.sample_offsets[b + 1])[:50]:
            if batch.candidates["product_id"][i] > 1:
                seen = item[begin : begin + batch.cuts[i]]
                assert np.sum(seen == batch.candidates["product_id"][i]) == batch.item_counts[i]


def test_kuairand_needs_its_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="KuaiRand is not at"):
        kuairand.schema(tmp_path / "nowhere")


def look_alike(folder: Path) -> None:
    """A few rows with KuaiRand's columns."""
    rng = np.random.default_rng(0)
    first = 1_650_816_000_000  # 25 April 2022 in China
    for name, day, days in (("exposures_a", 0, 6), ("exposures_b", 6, 8)):
        pl.DataFrame(
            {
                "user_id": rng.integers(0, 20, 400),
                "video_id": rng.integers(0, 50, 400),
                "time_ms": first + day * 86_400_000 + rng.integers(0, days * 86_400_000, 400),
                "is_click": rng.integers(0, 2, 400),
                "tab": rng.integers(0, 3, 400),
            }
        ).write_parquet(folder / f"{name}.parquet")
    pl.DataFrame(
        {
            "user_id": np.arange(20),
            "last_time_ms": first - rng.integers(1, 10**8, 20),
            "long_watch_seq": [rng.integers(0, 50, n).tolist() for n in range(20)],
        }
    ).write_parquet(folder / "user_history_before_0425_last50.parquet")
    pl.DataFrame(
        {
            "video_id": np.arange(50),
            **{n: rng.integers(0, 5, 50) for n in ("author_id", "tag", "music_id")},
            "video_type": "NORMAL",
            "upload_type": "Short",
            "video_duration": rng.random(50),
        }
    ).write_parquet(folder / "item_features.parquet")


@pytest.mark.parametrize("real", [False, True] if KUAIRAND.is_dir() else [False])
def test_kuairand_joins_old_watches_and_clicks(real: bool, tmp_path: Path) -> None:
    source = KUAIRAND if real else tmp_path / "raw"
    if not real:
        source.mkdir()
        look_alike(source)
    folder = prepared.build(kuairand.schema(source), tmp_path / "out")
    old = pl.read_parquet(source / "user_history_before_0425_last50.parquet")
    exposures = pl.read_parquet(str(source / "exposures_*.parquet"))
    clicks = exposures.filter(is_click=1).select("user_id", "video_id", "time_ms").n_unique()
    manifest = Dataset.open(folder).manifest
    assert manifest.behaviours == clicks + old["long_watch_seq"].list.len().sum()
    longest = old.sort(pl.col("long_watch_seq").list.len()).row(-1, named=True)
    mine = prepared.histories(folder).filter(user=longest["user_id"])
    assert mine["item"].to_list()[: len(longest["long_watch_seq"])] == longest["long_watch_seq"]
    positives = manifest.splits["train"].positives / manifest.splits["train"].samples
    assert positives == pytest.approx(exposures["is_click"].mean(), abs=0.1)
