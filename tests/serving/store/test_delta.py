"""A record and its delta are read as the record that was written at once, or not at all."""

import struct
import zlib
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from hashtab.serving.store import (
    COMPONENT_LIMIT,
    CorruptRecordError,
    Delta,
    Head,
    RecordLayout,
    TableOverflowError,
    TableStore,
    UserRecord,
    changed,
    check,
    extended,
    first_delta,
    pack,
    row_type,
    sum_by_bucket,
    unpack,
)
from hashtab.serving.store.delta import DELTA_LIMIT
from hashtab.serving.store.record import record_checksum
from tests.serving.store.records import FINGERPRINT, LAYOUT, numbered

few = settings(max_examples=60, deadline=None, derandomize=True)
LARGEST = COMPONENT_LIMIT - 1


def rows_of(
    count: int, rng: np.random.Generator, layout: RecordLayout = LAYOUT
) -> np.ndarray[Any, Any]:
    """Events that come and, some of them, go again."""
    rows = np.zeros(count, row_type(layout))
    rows["time"] = rng.integers(0, 20, count)
    rows["order"] = rng.integers(0, 2**64, count, np.uint64)
    rows["in_table"] = rng.integers(-1, 2, count)
    rows["in_log"] = 1
    rows["codes"] = rng.integers(0, layout.buckets, rows["codes"].shape)
    rows["vector"] = rng.integers(-LARGEST, COMPONENT_LIMIT, rows["vector"].shape)
    rows["counted"] = rng.integers(0, 6, rows["counted"].shape)
    for name, _ in layout.features:
        rows[f"recent.{name}"] = rng.integers(0, 99, count)
    return rows


def head(revision: int) -> Head:
    return Head(watermark=3, revision=revision)


def start(rng: np.random.Generator, events: int) -> UserRecord:
    """A record of some events, and of many behaviours that are in no log any more."""
    empty = replace(UserRecord.empty(LAYOUT), behaviours=1000)
    return changed(empty, Delta.of(head(1), rows_of(events, rng)), LAYOUT)


@few
@given(before=st.integers(0, 9), cuts=st.lists(st.integers(0, 5), max_size=6), seed=st.integers(0))
def test_what_is_read_is_what_was_written_at_once(before: int, cuts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    record = start(rng, before)
    data = pack(record, LAYOUT)
    delta = first_delta(data, record.table, head(1))
    added: list[np.ndarray[Any, Any]] = [rows_of(0, rng)]
    for number, count in enumerate(cuts):
        rows = rows_of(count, rng)
        last = head(number + 2)
        assert delta is not None
        longer = extended(delta, rows, head(number + 1), last)
        if sum(map(len, added)) + count > DELTA_LIMIT:
            assert longer is None
            break
        added.append(rows)
        assert longer is not None
        delta = longer
        check(data + delta, FINGERPRINT)
        found = unpack(data + delta, LAYOUT)
        every = Delta.of(last, np.concatenate(added))
        assert pack(found, LAYOUT) == pack(changed(record, every, LAYOUT), LAYOUT)
        assert (found.revision, found.watermark) == (last.revision, 3)


@few
@given(count=st.integers(0, 40), seed=st.integers(0))
def test_the_table_gains_the_sums_of_the_definition(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    record, rows = start(rng, 5), rows_of(count, rng)
    signed = rows["vector"] * rows["in_table"][:, None].astype(np.int32)
    expected = record.table + sum_by_bucket(rows["codes"], signed, LAYOUT.buckets)
    found = changed(record, Delta.of(head(2), rows), LAYOUT)
    np.testing.assert_array_equal(found.table, expected)
    assert found.behaviours == record.behaviours + int(rows["in_table"].sum(dtype=int))


def test_what_comes_and_goes_again_leaves_nothing() -> None:
    rng = np.random.default_rng(0)
    record, rows = start(rng, 5), rows_of(8, rng)
    rows["in_table"] = 1
    back = rows.copy()
    back["in_table"] = back["in_log"] = -1
    both = Delta.of(head(1), np.concatenate([rows, back]))
    assert pack(changed(record, both, LAYOUT), LAYOUT) == pack(record, LAYOUT)


def test_a_table_that_as_many_rows_could_overflow_has_no_delta() -> None:
    record = UserRecord.empty(LAYOUT)
    room = 2**31 - 1 - DELTA_LIMIT * COMPONENT_LIMIT
    for sign in (1, -1):
        record.table[0, 0, 0] = sign * room
        assert first_delta(pack(record, LAYOUT), record.table, head(1)) is not None
        record.table[0, 0, 0] = sign * (room + 1)
        assert first_delta(pack(record, LAYOUT), record.table, head(1)) is None


@pytest.mark.parametrize("count", [1, DELTA_LIMIT + 1])
def test_a_sum_that_leaves_int32_is_refused_and_one_that_comes_back_is_not(count: int) -> None:
    rows = rows_of(2 * count, np.random.default_rng(0))
    rows["codes"], rows["vector"] = 0, LARGEST
    rows["in_table"] = np.repeat([1, -1], count)
    record = UserRecord.empty(LAYOUT)
    record.table[:, 0] = 2**31 - 1
    back = changed(record, Delta.of(head(2), rows), LAYOUT)
    np.testing.assert_array_equal(back.table, record.table)
    with pytest.raises(TableOverflowError, match="would become"):
        changed(record, Delta.of(head(2), rows[: count + count // 2]), LAYOUT)


def test_every_flipped_bit_and_every_cut_of_a_delta_is_seen() -> None:
    layout = replace(LAYOUT, size=1)
    data = numbered(1, size=1)
    delta = first_delta(data, np.zeros(layout.shape, np.int32), head(1))
    assert delta is not None
    delta = extended(delta, rows_of(1, np.random.default_rng(0), layout), head(1), head(2))
    assert delta is not None
    none = rows_of(0, np.random.default_rng(0), layout)
    assert extended(delta, none, head(2), head(3)) is not None
    for bit in range(8 * len(delta)):
        bad = bytearray(delta)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecordError):
            check(data + bytes(bad), FINGERPRINT)
        assert extended(bytes(bad), none, head(2), head(3)) is None
    for end in range(1, len(delta)):
        with pytest.raises(CorruptRecordError):
            unpack(data + delta[:end], layout)


def test_an_event_that_comes_again_counts_as_it_came_last() -> None:
    rows = rows_of(3, np.random.default_rng(0))
    rows["time"], rows["order"], rows["in_log"] = 7, 11, [1, -1, 1]
    rows["recent.item"] = [1, 1, 2]
    found = changed(UserRecord.empty(LAYOUT), Delta.of(head(2), rows), LAYOUT)
    assert found.recent["item"].tolist() == [2]
    assert changed(found, Delta.of(head(3), rows[1:2]), LAYOUT).recent["item"].tolist() == []


@pytest.mark.parametrize("size", [7, (DELTA_LIMIT + 1) * row_type(LAYOUT).itemsize])
def test_half_a_row_and_too_many_are_refused(size: int) -> None:
    data = numbered(1)
    body = struct.pack("<IQq", record_checksum(data), 1, 3) + bytes(size)
    sealed = struct.pack("<4sI", b"htud", zlib.crc32(body)) + body
    with pytest.raises(CorruptRecordError, match="half a row or too many"):
        unpack(data + sealed, LAYOUT)
    assert extended(sealed, rows_of(0, np.random.default_rng(0)), head(1), head(2)) is None


def test_a_delta_of_another_moment_of_the_log_is_not_extended() -> None:
    delta = first_delta(numbered(1), np.zeros(LAYOUT.shape, np.int32), head(1))
    assert delta is not None
    assert extended(delta, rows_of(1, np.random.default_rng(0)), head(2), head(3)) is None


def test_a_record_that_no_log_orders_has_no_delta() -> None:
    record = start(np.random.default_rng(0), 5)
    record = replace(record, events=record.events[:0])
    with pytest.raises(CorruptRecordError, match="not made from a log"):
        changed(record, Delta.of(head(2), rows_of(1, np.random.default_rng(0))), LAYOUT)


def test_the_delta_of_another_record_is_seen() -> None:
    delta = first_delta(numbered(1), np.zeros(LAYOUT.shape, np.int32), head(1))
    assert delta is not None
    unpack(numbered(1) + delta, LAYOUT)
    with pytest.raises(CorruptRecordError, match="delta belongs to another record"):
        unpack(numbered(2) + delta, LAYOUT)
    with pytest.raises(CorruptRecordError, match="delta belongs to another record"):
        check(numbered(2) + delta, FINGERPRINT)


def test_a_store_gives_deltas_after_records_and_counts_and_deletes_them_with_them(
    store: TableStore,
) -> None:
    def write(change: Any) -> None:
        change.put_records(
            FINGERPRINT, {1: b"one", "a": b"two", 3: b"three"}, {1: b"+1", "a": b"+2"}
        )

    store.change([], write)
    assert store.get(FINGERPRINT, [1, "a", 3, 4]) == [b"one+1", b"two+2", b"three", None]
    assert dict(store.items(FINGERPRINT)) == {1: b"one+1", "a": b"two+2", 3: b"three"}
    assert store.counts() == {FINGERPRINT: 3}
    with store.reading() as log:
        assert log.records(FINGERPRINT, [1, 3]) == [b"one+1", b"three"]
        assert log.deltas(FINGERPRINT, [1, 3, 4]) == [b"+1", None, None]
    store.change([], lambda change: change.put_deltas(FINGERPRINT, {1: b"+11"}))
    assert store.get(FINGERPRINT, [1]) == [b"one+11"]
    store.change([], lambda change: change.put_records(FINGERPRINT, {1: b"new", "a": None}))
    assert store.get(FINGERPRINT, [1, "a"]) == [b"new", None]
    store.change([], write)
    assert store.remove(FINGERPRINT, [1, 4]) == 1
    store.put(FINGERPRINT, {"a": b"put"})
    assert store.get(FINGERPRINT, [1, "a"]) == [None, b"put"]
    store.change([], lambda change: change.put_deltas(FINGERPRINT, {1: b"+1", "a": b"+2"}))
    store.put(FINGERPRINT, {"a": None})
    with store.reading() as log:
        assert log.deltas(FINGERPRINT, [1, "a"]) == [b"+1", None]
    assert store.drop(FINGERPRINT) == 1  # and the delta of no record with it
    assert FINGERPRINT not in store.fingerprints()
