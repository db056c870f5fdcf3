"""A record comes back as it was, equal ones have equal bytes, and no damage goes unseen."""

import struct
import zlib
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from hashtab.serving.store import (
    CorruptRecordError,
    ForeignRecordError,
    RecordLayout,
    StoreError,
    UserRecord,
    check,
    pack,
    unpack,
)
from tests.serving.store.records import LAYOUT, numbered

few = settings(max_examples=60, deadline=None, derandomize=True)
Packed = tuple[RecordLayout, UserRecord, bytes]

layouts = st.builds(
    RecordLayout,
    fingerprint=st.binary(min_size=8, max_size=8),
    groups=st.integers(0, 4),
    buckets=st.integers(1, 9),
    size=st.integers(1, 5),
    recent=st.integers(0, 6),
    features=st.sampled_from([(), (("item", "int32"),), (("é", "float32"), ("b", "int32"))]),
    counters=st.sampled_from([(), ("item",), ("item", "brand")]),
)


@st.composite
def records(draw: st.DrawFn, layout: RecordLayout) -> UserRecord:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    table = rng.integers(-(2**31), 2**31, layout.shape, np.int32)
    table[rng.random(layout.shape[:2]) < draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))] = 0
    recent = draw(st.integers(0, layout.recent))
    counted = draw(st.integers(0, 4))
    keys = np.sort(rng.choice(10_000, counted, replace=False)).astype(np.uint32)
    return UserRecord(
        revision=draw(st.integers(0, 2**64 - 1)),
        watermark=draw(st.integers(-(2**63), 2**63 - 1)),
        behaviours=draw(st.integers(0, 2**64 - 1)),
        table=table,
        recent_times=np.sort(rng.integers(-(2**63), 2**63, recent, np.int64)),
        recent={name: rng.integers(0, 99, recent).astype(kind) for name, kind in layout.features},
        counters={n: (keys, rng.integers(0, 9, counted, np.uint32)) for n in layout.counters},
        events=rng.integers(0, 2**64, draw(st.integers(0, 7)), np.uint64),
    )


@st.composite
def packed(draw: st.DrawFn) -> Packed:
    layout = draw(layouts)
    record = draw(records(layout))
    return layout, record, pack(record, layout)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@few
@given(packed())
def test_a_record_comes_back(given_: Packed) -> None:
    layout, record, data = given_
    found = unpack(data, layout)
    check(data, layout.fingerprint)
    for name in ("revision", "watermark", "behaviours"):
        assert getattr(found, name) == getattr(record, name)
    for name in ("table", "recent_times", "events"):
        same(getattr(found, name), getattr(record, name))
    assert list(found.recent) == [name for name, _ in layout.features]
    for name in found.recent:
        same(found.recent[name], record.recent[name])
    assert list(found.counters) == list(layout.counters)
    for name in found.counters:
        for part in (0, 1):
            same(found.counters[name][part], record.counters[name][part])
    assert pack(found, layout) == data


@few
@given(packed(), st.data())
def test_every_flipped_bit_is_seen(given_: Packed, data: st.DataObject) -> None:
    layout, _, good = given_
    bits = data.draw(st.sets(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=30))
    for bit in bits:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecordError):
            unpack(bytes(bad), layout)


def test_each_single_bit_of_a_record_is_covered() -> None:
    good = numbered(3, size=1)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecordError):
            check(bytes(bad), LAYOUT.fingerprint)


@few
@given(packed(), st.data())
def test_a_cut_or_lengthened_record_is_seen(given_: Packed, data: st.DataObject) -> None:
    layout, _, good = given_
    end = data.draw(st.integers(0, len(good) - 1))
    for bad in (good[:end], good + b"\0", good + good):
        with pytest.raises(CorruptRecordError):
            unpack(bad, layout)


@few
@given(st.binary(max_size=300))
def test_random_bytes_are_no_record(data: bytes) -> None:
    for tried in (data, b"htur" + data):
        with pytest.raises(CorruptRecordError):
            unpack(tried, LAYOUT)


@few
@given(packed(), st.data())
def test_even_sealed_nonsense_raises_nothing_else(given_: Packed, data: st.DataObject) -> None:
    layout, _, good = given_
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(8, len(bad) - 4) | st.just(56) | st.just(68))
        struct.pack_into("<I", bad, place, data.draw(st.integers(0, 3) | st.just(2**32 - 1)))
    struct.pack_into("<I", bad, 4, zlib.crc32(bad[8:]))
    try:
        found = unpack(bytes(bad), layout)
    except (CorruptRecordError, ForeignRecordError):
        return
    assert found.table.shape == layout.shape
    assert len(found.recent_times) <= layout.recent


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 8, "buckets": 4},
        {"recent": 6},
        {"features": (("price", "float32"), ("item", "int32"))},
        {"features": (("item", "float32"), ("price", "float32"))},
        {"counters": ("brand",)},
    ],
)
def test_another_layout_is_never_read(change: dict[str, Any]) -> None:
    with pytest.raises(ForeignRecordError, match="another layout"):
        unpack(numbered(1), replace(LAYOUT, **change))


def test_another_fingerprint_is_never_read() -> None:
    other = replace(LAYOUT, fingerprint=b"other...")
    with pytest.raises(ForeignRecordError, match=LAYOUT.fingerprint.hex()):
        unpack(numbered(1), other)
    with pytest.raises(ForeignRecordError, match=LAYOUT.fingerprint.hex()):
        check(numbered(1), other.fingerprint)


def test_a_newer_format_says_so() -> None:
    newer = bytearray(numbered(1))
    struct.pack_into("<I", newer, 8, 3)
    struct.pack_into("<I", newer, 4, zlib.crc32(newer[8:]))
    with pytest.raises(ForeignRecordError, match="format 3, this hashtab reads 2"):
        unpack(bytes(newer), LAYOUT)


@given(st.data())
@few
def test_equal_records_have_equal_bytes(data: st.DataObject) -> None:
    record = data.draw(records(LAYOUT))
    strided = np.asfortranarray(record.table)
    backwards = dict(reversed(record.recent.items()))
    assert pack(replace(record, table=strided, recent=backwards), LAYOUT) == pack(record, LAYOUT)


def test_empty_rows_of_a_wide_table_take_a_bit_each() -> None:
    wide = replace(LAYOUT, groups=16, buckets=32, size=32)
    empty = UserRecord.empty(wide)
    table = np.zeros(wide.shape, np.int32)
    table[:, ::4] = 1
    assert len(pack(empty, wide)) == 72 + 4 + 64  # header, counter length, bitmap
    assert len(pack(replace(empty, table=table), wide)) == 72 + 4 + 64 + 128 * 32 * 4
    assert len(pack(replace(empty, table=table + 1), wide)) == 72 + 4 + 512 * 32 * 4


def test_an_empty_record_keeps_its_watermark() -> None:
    found = unpack(pack(UserRecord.empty(LAYOUT, watermark=17), LAYOUT), LAYOUT)
    assert (found.watermark, found.revision, found.behaviours) == (17, 0, 0)
    assert not found.table.any()


NONE = np.empty(0, np.uint32)
TWO = np.array([4, 3], np.int64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"table": np.zeros((4, 8, 15), np.int32)}, r"table must be int32 of shape \(4, 8, 16\)"),
        ({"table": np.zeros((4, 8, 16))}, "table must be int32 .* got float64"),
        ({"recent_times": np.arange(6)}, "at most 5 entries, got 6"),
        ({"recent_times": TWO}, "must be in time order"),
        ({"recent_times": np.arange(2)}, r"recent\['item'\] must be int32 of shape \(2,\)"),
        ({"recent": {}}, r"recent must have the entries \['item', 'price'\], got \[\]"),
        ({"counters": {"brand": (NONE, NONE)}}, r"counters must have the entries \['item'\]"),
        ({"counters": {"item": (TWO.astype(np.uint32), NONE)}}, "counts must be uint32"),
        ({"counters": {"item": (TWO.astype(np.uint32),) * 2}}, "keys must ascend"),
        ({"events": np.arange(2)}, "events must be uint64"),
        ({"revision": -1}, "revision and behaviours must be unsigned .* got -1"),
        ({"watermark": 2**63}, "watermark"),
    ],
)
def test_a_record_that_does_not_fit_is_not_packed(change: dict[str, Any], said: str) -> None:
    with pytest.raises(StoreError, match=said):
        pack(replace(UserRecord.empty(LAYOUT), **change), LAYOUT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": b"short"}, "fingerprint must have 8 bytes"),
        ({"groups": -1}, "got -1, 8 and 16"),
        ({"buckets": 0}, "got 4, 0 and 16"),
        ({"recent": 65_536}, "recent must lie in 0 to 65535, got 65536"),
        ({"features": (("item", "int64"),)}, "'item' must be int32 or float32, got 'int64'"),
        ({"features": (("a", "int32"), ("a", "int32"))}, "names of features must differ"),
        ({"counters": ("a", "a")}, "names of counters must differ"),
    ],
)
def test_an_impossible_layout_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(StoreError, match=said):
        replace(LAYOUT, **change)
