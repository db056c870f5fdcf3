"""Encoders and counters against their definitions."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashtab.features import encoders
from hashtab.features.counters import count_before
from hashtab.features.encoders import Encoder, Moments, Scaler, Vocabulary
from hashtab.features.tables import stable_hash
from tests.features import logs, prepared

events = st.lists(st.tuples(st.integers(-3, 3), st.integers(-5, 5)), max_size=40)


@given(events=events, questions=events)
def test_counts_are_those_of_a_loop(
    events: list[tuple[int, int]], questions: list[tuple[int, int]]
) -> None:
    def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        table = np.array(rows, np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    found = count_before(*columns(events), *columns(questions))
    expected = [sum(g == group and m < moment for g, m in events) for group, moment in questions]
    assert found.tolist() == expected


def test_counts_hold_for_microseconds_and_large_groups() -> None:
    groups = np.array([2**62, 2**62, 5])
    times = np.array([1_700_000_000_000_000, 1_700_000_000_000_001, 0])
    found = count_before(groups, times, np.array([2**62, 5]), times[[1, 2]])
    assert found.tolist() == [1, 0]


@pytest.mark.parametrize("kinds", ["few", "one an item"])
def test_stored_counters_are_those_of_a_loop(kinds: str, tmp_path: Path) -> None:
    schema = logs.shop(tmp_path)
    if kinds == "one an item":
        table = pl.read_parquet(tmp_path / "items.parquet")
        names = pl.when(pl.col("product") % 3 > 0).then(pl.format("k{}", "product"))
        table.with_columns(kind=names).write_parquet(tmp_path / "items.parquet")
    shop = prepared.build(schema, tmp_path / "out")
    histories, catalogue = prepared.histories(shop), prepared.catalogue(shop)
    kind_of = dict(catalogue.select("_item", "kind").iter_rows())
    mine = {
        user: part["item"].to_list()
        for (user,), part in histories.group_by("user", maintain_order=True)
    }
    samples = prepared.samples(shop, "test")
    for row in samples.iter_rows(named=True):
        past = mine[row["user"]][: row["history_end"]]
        kind = kind_of[row["item"]]
        assert row["item_count"] == past.count(row["item"])
        known = kind != encoders.UNKNOWN_ID
        assert row["count_kind"] == (known and sum(kind_of[item] == kind for item in past))
    assert (samples["item_count"] > 2).any()


@pytest.mark.parametrize("values", [[3, 1, None, 3], ["b", "a", None, "b"]])
def test_a_vocabulary_has_ids_for_padding_and_unknown(values: list[object]) -> None:
    vocabulary = Vocabulary.fit(pl.Series(values))
    assert vocabulary.size == 4
    unseen = 9 if isinstance(values[0], int) else "z"
    asked = pl.DataFrame({"x": [*values, unseen]})
    ids = asked.select(vocabulary.encode(pl.col("x")))["x"]
    assert ids.to_list() == [3, 2, 1, 3, 1]
    assert ids.dtype == pl.Int32


def test_a_vocabulary_without_values_knows_nothing() -> None:
    vocabulary = Vocabulary.fit(pl.Series([None, None], dtype=pl.String))
    frame = pl.DataFrame({"x": ["a", None]})
    assert frame.select(vocabulary.encode(pl.col("x")))["x"].to_list() == [1, 1]


def test_a_scaler_gives_standard_units_and_zero_for_missing() -> None:
    values = pl.Series([1.0, 3.0, None, float("nan"), float("inf")])
    scaler = Scaler.of(Moments.of(values))
    assert (scaler.mean, scaler.std) == (2.0, 1.0)
    scaled = pl.DataFrame({"x": values}).select(scaler.encode(pl.col("x")))["x"]
    assert scaled.to_list() == [-1.0, 1.0, 0.0, 0.0, 0.0]
    assert scaled.dtype == pl.Float32


@pytest.mark.parametrize("values", [[5.0, 5.0], [0.1] * 100, [None, None]])
def test_a_scaler_of_values_that_do_not_vary_stays_finite(values: list[float | None]) -> None:
    scaler = Scaler.of(Moments.of(pl.Series(values, dtype=pl.Float64)))
    assert scaler.std == 1.0


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_a_scale_does_not_depend_on_how_its_values_were_cut(
    values: list[float], cuts: list[int]
) -> None:
    parts = np.split(np.array(values), sorted(min(cut, len(values)) for cut in cuts))
    moments = Moments()
    for part in parts:
        moments += Moments.of(pl.Series(part))
    cut, whole = Scaler.of(moments), Scaler.of(Moments.of(pl.Series(values)))
    assert cut.mean == pytest.approx(whole.mean, rel=1e-5, abs=1e-5 * whole.std)
    assert cut.std == pytest.approx(whole.std, rel=1e-5)


def test_a_value_too_large_for_float32_is_no_infinity() -> None:
    scaled = pl.DataFrame({"x": [1e300]}).select(Scaler(0.0, 1.0).encode(pl.col("x")))["x"]
    assert scaled.to_list() == [0.0]


def test_a_category_that_is_not_a_number_is_missing() -> None:
    vocabulary = Vocabulary.fit(pl.Series([1.0, float("nan"), 2.0]))
    assert vocabulary.values == ("1.0", "2.0")


def test_encoders_survive_storage(tmp_path: Path) -> None:
    known: dict[str, Encoder] = {
        "a": Vocabulary((1, 2)),
        "b": Vocabulary(("x", "ü")),
        "c": Scaler(0.1, 2.5),
    }
    (tmp_path / "encoders.json").write_text(encoders.to_json(known))
    assert encoders.load(tmp_path / "encoders.json") == known


def test_the_hash_of_a_user_is_the_same_everywhere() -> None:
    assert stable_hash(900) == stable_hash("900") == 2862882594307232845
