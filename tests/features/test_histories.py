"""Histories as of any time against plain loops, and in the ids of encoders learned elsewhere."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashtab.features import encoders
from hashtab.features.catalogue import Catalogue
from hashtab.features.encoders import Encoder, Scaler, Vocabulary
from hashtab.features.errors import DataError
from hashtab.features.histories import Histories, HistoryReader
from tests.features import logs, prepared

times = st.lists(st.integers(0, 9), max_size=6).map(sorted)


@given(users=st.lists(times, max_size=5), moments=st.lists(st.integers(-1, 10), max_size=3))
def test_a_cut_keeps_what_is_strictly_earlier(users: list[list[int]], moments: list[int]) -> None:
    ends = np.cumsum([len(own) for own in users]).astype(np.int64)
    every = np.array([time for own in users for time in own], np.int64)
    histories = Histories(
        users=pl.Series(range(len(users)), dtype=pl.Int64),
        starts=np.concatenate([[0], ends])[:-1].astype(np.int64),
        ends=ends,
        rows=np.arange(len(every)),
        times=every,
        side={},
    )
    assert histories.before(None) is histories
    for moment in moments:  # one after another: what is cut away does not come back
        histories = histories.before(moment)
    limit = min(moments, default=10)
    found = [every[histories.of(user)].tolist() for user in range(len(histories))]
    assert found == [[time for time in own if time < limit] for own in users]


def test_every_user_of_the_log_is_in_the_shard_that_its_hash_names(shop: Path) -> None:
    reader, seen = HistoryReader(shop), {}
    for shard in range(reader.manifest.shards):
        for i, user in enumerate((histories := reader.shard(shard)).users.to_list()):
            assert reader.shard_of(user) == shard
            seen[user] = histories.rows[histories.of(i)]
    items = reader.catalogue.items
    for (user,), part in prepared.histories(shop).group_by("user", maintain_order=True):
        assert items.gather(seen.pop(user)).to_list() == part["item"].to_list()
    assert not seen


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop with more products and a store whose name comes first, all in training time."""
    folder = tmp_path_factory.mktemp("later")
    schema = logs.shop(folder / "raw")
    log = pl.read_parquet(folder / "raw" / "purchases.parquet")
    week = pl.col("week") == 3
    new = [
        log.filter(week).with_columns(product=pl.col("product") - 1),
        log.filter(week).with_columns(store=pl.lit(-5, pl.Int64), price=pl.lit(None, pl.Float64)),
    ]
    pl.concat([log, *new]).write_parquet(folder / "raw" / "purchases.parquet")
    return prepared.build(schema, folder / "shop")


def _by_user(reader: HistoryReader, shards: int) -> dict[object, pl.DataFrame]:
    found = {}
    for histories in map(reader.shard, range(shards)):
        for i, user in enumerate(histories.users.to_list()):
            kept = histories.of(i)
            columns = {name: column[kept] for name, column in histories.side.items()}
            rows, moments = histories.rows[kept], histories.times[kept]
            found[user] = pl.DataFrame({"row": rows, "time": moments, **columns})
    return found


def test_a_later_data_set_reads_in_the_ids_of_the_first(shop: Path, later: Path) -> None:
    catalogue = Catalogue.read(shop / "tables" / "catalogue.arrow", "product")
    learned = encoders.load(shop / "tables" / "encoders.json")
    assert learned["store"] != encoders.load(later / "tables" / "encoders.json")["store"]
    side = {name: learned[name] for name in ("store", "price")}
    first = _by_user(HistoryReader(shop), 3)
    again = _by_user(HistoryReader(later, catalogue, side), 3)
    assert set(again) == set(first)
    for user, known in first.items():
        frame = again[user].with_columns(new=(pl.col("row") < 0) | (pl.col("store") == 1))
        kept = frame.filter(~pl.col("new")).sort("time", "row", "store", "price")
        known = known.sort("time", "row", "store", "price")
        assert kept.select("row", "time", "store").equals(known.select("row", "time", "store"))
        assert np.allclose(kept["price"], known["price"], atol=1e-5)
    every = prepared.histories(later)
    strangers = every.filter(~pl.col("item").is_in(catalogue.items.implode()))
    unknown = pl.concat(list(again.values())).filter(pl.col("row") < 0)
    assert len(unknown) == len(strangers) > 0


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"colour": Vocabulary(("red",))}, "have no categorical side feature 'colour'"),
        ({"price": Vocabulary((1, 2))}, "have no categorical side feature 'price'"),
        ({"store": Scaler(0.0, 1.0)}, "have no numeric side feature 'store'"),
        # Known to the data set, but not of its behaviours.
        ({"display": Vocabulary(("d0",))}, "have no categorical side feature 'display'"),
    ],
)
def test_a_side_feature_that_is_not_there_is_named(
    wanted: dict[str, Encoder], said: str, shop: Path
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        HistoryReader(shop, None, wanted)
    assert "they have ['store', 'price']" in str(caught.value)
    assert str(shop) in str(caught.value)


def test_shards_without_users_have_empty_histories(tmp_path: Path) -> None:
    folder = prepared.build(logs.feed(tmp_path / "raw"), tmp_path / "feed", shards=40)
    reader = HistoryReader(folder)
    sizes = [len(reader.shard(shard).before(2**60)) for shard in range(40)]
    assert 0 in sizes
    assert sum(sizes) == reader.manifest.users


def test_a_missing_number_stays_missing_in_another_scale() -> None:
    turn = encoders.translation(Scaler(mean=10, std=2), Scaler(mean=0, std=1))
    assert turn(np.array([0, 1, -5], np.float32)).tolist() == [0, 12, 0]
