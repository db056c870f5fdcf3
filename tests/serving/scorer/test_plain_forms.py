"""What a request says one by one means, to the bit, what a file of requests says in columns."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings

from hashtab.features.catalogue import Catalogue
from hashtab.features.encoders import Encoder, Scaler, Vocabulary
from hashtab.features.samples import TIME_FEATURE_SIZES, time_features
from hashtab.features.storage import Array
from hashtab.pipelines.requests import _user
from hashtab.serving.bundle import Bundle
from hashtab.serving.items import Item, ItemIndex
from hashtab.serving.scorer.context import time_id
from hashtab.serving.scorer.counters import CounterReader
from hashtab.serving.scorer.users import user_of
from hashtab.serving.scorer.values import PlainEncoder
from hashtab.serving.store import UserRecord

often = settings(max_examples=80, deadline=None, derandomize=True)
few = settings(max_examples=25, deadline=None, derandomize=True)
int64s = st.integers(-(2**63), 2**63 - 1)
near = st.sampled_from([0, 1, 2, 7, 8, 2**53 + 1, 2**62])
floats = st.one_of(
    st.floats(), st.sampled_from([7.0, 7.5, -0.0, 2.0**63, 1e21, 3.4028235e38, 3.4028236e38, 1e-46])
)
texts = st.one_of(
    st.sampled_from(["7", "007", " 7", "+7", "7.0", "7.5", "a", "true", "NaN", "1e+21", "", "٣"]),
    st.text(st.characters(codec="utf-8"), max_size=8),
)
columns = st.one_of(
    st.tuples(st.just(pl.Int64), st.lists(st.one_of(near, int64s, st.none()))),
    st.tuples(st.just(pl.Float64), st.lists(st.one_of(floats, st.none()))),
    st.tuples(st.just(pl.Boolean), st.lists(st.one_of(st.booleans(), st.none()))),
    st.tuples(st.just(pl.String), st.lists(st.one_of(texts, st.none()))),
)
ENCODERS = [
    Vocabulary((0, 1, 7, 2**62)),
    Vocabulary(("", "007", "1", "1e+21", "7", "7.0", "NaN", "a", "true")),
    Vocabulary(()),
    Scaler(2.5, 0.3),
    Scaler(1e300, 1e-300),
]


@pytest.mark.parametrize("encoder", ENCODERS)
@given(column=columns)
@often
def test_values_are_encoded_as_a_column_of_them_is(encoder: Encoder, column: Any) -> None:
    dtype, values = column
    plain = PlainEncoder(encoder)
    if plain.numeric and dtype == pl.String:
        return  # is refused, here and in files
    frame = pl.DataFrame({"value": pl.Series(values, dtype=dtype)})
    expected = frame.select(encoder.encode(pl.col("value"))).to_series().to_numpy()
    encoded = plain.encode(values)
    assert encoded.dtype == expected.dtype
    np.testing.assert_array_equal(encoded.view(np.int32), expected.view(np.int32))
    for value, one in zip(values, expected, strict=True):
        assert plain.encode_one(value).tobytes() == one.tobytes()
    there = frame["value"].is_finite() if dtype == pl.Float64 else frame["value"].is_not_null()
    missing = (~there.fill_null(False)).arg_true().to_list()
    assert plain.missing(values, encoded) == missing


@pytest.mark.parametrize("encoder", ENCODERS)
def test_integers_of_more_than_64_bits_are_encoded_and_not_refused(encoder: Encoder) -> None:
    assert len(PlainEncoder(encoder).encode([2**64, -(2**70), 10**400])) == 3


@pytest.mark.parametrize("text", [False, True])
@given(column=columns)
@example(column=(pl.String, ["\x1c7", "\x857", "7\n", "7.0\n", "9223372036854775808", "1_0"]))
@often
def test_users_are_read_as_in_files(text: bool, column: Any) -> None:
    dtype, values = column
    if dtype == pl.Boolean:
        return  # is refused
    frame = pl.DataFrame({"user": pl.Series(values, dtype=dtype)})
    expected = frame.select(_user(dtype, text)).to_series().to_list()
    assert [user_of(value, text) for value in values] == expected


@pytest.mark.parametrize("text", [False, True])
@given(values=st.lists(st.one_of(near, int64s), min_size=1, unique=True), asked=columns)
@few
def test_items_are_found_as_in_the_catalogue(text: bool, values: list[int], asked: Any) -> None:
    items = pl.Series([str(v) for v in values] if text else values).sort()
    catalogue = Catalogue(items, {}, "item")
    index = ItemIndex(catalogue)
    np.testing.assert_array_equal(index.rows(values), catalogue.rows(pl.Series(values)))
    dtype, column = asked
    if dtype == pl.Boolean:
        return  # is refused
    expected = catalogue.rows(pl.Series(column, dtype=dtype))
    np.testing.assert_array_equal(index.rows(column), expected)


def test_an_item_of_mixed_lists_counts_by_its_own_type() -> None:
    index = ItemIndex(Catalogue(pl.Series([3, 7]), {}, "item"))
    asked: list[Item] = [7, "7", 7.0, 7.5, None, 2**64, "x", 3]
    assert index.rows(asked).tolist() == [1, 1, 1, -1, -1, -1, -1, 0]


def test_many_items_are_all_found() -> None:
    values = np.unique(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 50_000))
    index = ItemIndex(Catalogue(pl.Series(values), {}, "item"))
    np.testing.assert_array_equal(index.rows(values.tolist()), np.arange(len(values)))
    np.testing.assert_array_equal(index.rows((values + 1).tolist()[:-1]), -1)


@given(times=st.lists(st.one_of(int64s, st.none()), min_size=1))
@often
def test_features_of_a_time_are_those_of_a_column_of_times(times: list[int | None]) -> None:
    for column in time_features(TIME_FEATURE_SIZES, pl.Series(times, dtype=pl.Int64)):
        assert [time_id(column.name, time) for time in times] == column.to_list()


@pytest.fixture(scope="module")
def bundle(shop_bundle: Path) -> Bundle:
    return Bundle.open(shop_bundle)


def _counted(bundle: Bundle, pairs: dict[int, int]) -> UserRecord:
    keys = np.array(sorted(pairs), np.uint32)
    times: Array = np.array([pairs[k] for k in sorted(pairs)], np.uint32)
    record = UserRecord.empty(bundle.layout)
    counters = dict.fromkeys(bundle.layout.counters, (keys, times))
    return UserRecord(**{**record.__dict__, "counters": counters})


@given(
    users=st.lists(
        st.dictionaries(st.integers(0, 60), st.integers(1, 2**32 - 1), max_size=20), min_size=1
    ),
    rows=st.lists(st.integers(-1, 35), max_size=20),
)
@few
def test_counters_are_those_of_the_bundle_user_after_user(
    bundle: Bundle, users: list[dict[int, int]], rows: list[int]
) -> None:
    reader, wanted = CounterReader(bundle), np.array(rows, np.int64)
    for pairs in users:
        record = _counted(bundle, pairs)
        np.testing.assert_array_equal(reader.read(record, wanted), bundle.counters(record, wanted))
