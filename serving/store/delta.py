"""What a user's record has changed by since it was written whole: small, and added when it is read.

A record may have 70 kB, of which an event changes a few rows. So writers add some 200 bytes to the
user's delta, and write the record anew once its delta has `DELTA_LIMIT` rows. A delta's bytes lie
under a key of their own; whoever reads gets them after those of the record.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Self

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from hashtab.serving.store.errors import CorruptRecordError
from hashtab.serving.store.fixed_point import COMPONENT_LIMIT, add
from hashtab.serving.store.log import Head
from hashtab.serving.store.record import (
    FEATURE_TYPES,
    RecordLayout,
    UserRecord,
    open_record,
    record_checksum,
    unpack_record,
)

DELTA_LIMIT = 16
"""Rows of a delta: each costs its readers microseconds, and spares writers a share of a record.

A first delta promises room in the table for so many, so another number is another store format.
"""

_FEW = 4 * DELTA_LIMIT  # rows that are best added one after another
_MAGIC = b"htud"
_START = struct.Struct("<4sI")  # magic, CRC-32 of all that follows
_REST = struct.Struct("<IQq")  # checksum of the record, then as in `Delta`
_HEADER_BYTES = _START.size + _REST.size
_INT32 = np.iinfo(np.int32)


@lru_cache(maxsize=64)
def row_type(layout: RecordLayout) -> np.dtype[Any]:
    """Return the type of a delta's rows: what one event adds to a record, or takes out of it.

    `in_table` and `in_log` are 1 where table or log gain the event, -1 where they lose it, else 0.
    """
    return np.dtype(
        [
            ("time", "<i8"),
            ("order", "<u8"),
            ("in_table", "i1"),
            ("in_log", "i1"),
            ("codes", "<i4", (layout.groups,)),
            ("vector", "<i4", (layout.size,)),
            ("counted", "<u4", (len(layout.counters),)),
            *((f"recent.{name}", FEATURE_TYPES[kind]) for name, kind in layout.features),
        ]
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """Changes of a record.

    Args:
        revision: of the record after them.
        watermark: of the record after them.
        rows: `[K]` of `row_type` in the order of the changes; vectors stay below
            `COMPONENT_LIMIT`.
    """

    revision: int
    watermark: int
    rows: NDArray[np.void]

    @classmethod
    def of(cls, head: Head, rows: NDArray[np.void]) -> Self:
        """Return the changes that bring a record to what the log says of its user."""
        return cls(revision=head.revision, watermark=head.watermark, rows=rows)


def first_delta(record: bytes, table: NDArray[np.int32], head: Head) -> bytes | None:
    """Return a delta without rows; None if the table might overflow by as many as it may get.

    Args:
        record: packed.
        table: of the record.
        head: of the log, as it is in the record.
    """
    if not _has_room(table, DELTA_LIMIT):
        return None
    return _packed(record_checksum(record), head, b"")


def extended(delta: bytes, rows: NDArray[np.void], before: Head, after: Head) -> bytes | None:
    """Return a delta with more rows; None if it is full, damaged or not that of the log before.

    Args:
        delta: packed.
        rows: `[K]` of `row_type`.
        before: what the log said of the user.
        after: what it says with these rows.
    """
    size = len(delta) - _HEADER_BYTES + rows.nbytes
    if size > DELTA_LIMIT * rows.itemsize or size % rows.itemsize or not _whole(delta):
        return None
    record, revision, _ = _REST.unpack_from(delta, _START.size)
    if revision != before.revision:
        return None
    return _packed(record, after, delta[_HEADER_BYTES:] + rows.tobytes())


def unpack(data: bytes, layout: RecordLayout) -> UserRecord:
    """Read a record and the delta after it.

    Args:
        data: as a store gives it.
        layout: of the record.

    Raises:
        CorruptRecordError: if the bytes are not those of a whole record, or its delta's are not.
        ForeignRecordError: if it is a record of another fingerprint, layout or format.
    """
    record, delta = split(data, layout)
    # Who wrote the delta has seen to it that the table has room.
    return record if delta is None else _changed(record, delta, layout, _added)


def split(data: bytes, layout: RecordLayout) -> tuple[UserRecord, Delta | None]:
    """Read a record as it was written whole, and its delta where there is one.

    Raises:
        CorruptRecordError, ForeignRecordError: as `unpack`.
    """
    record, end = unpack_record(data, layout)
    return record, None if end == len(data) else _read(data, end, layout)


def check(data: bytes, fingerprint: bytes) -> None:
    """Check that `data` is a whole record of a fingerprint, of whatever layout, and its delta.

    Raises:
        CorruptRecordError: if the bytes are not those of a whole record, or its delta's are not.
        ForeignRecordError: if it is a record of another fingerprint or format.
    """
    end = open_record(data, fingerprint).size
    if end != len(data):
        _check(data, end)


def changed(record: UserRecord, delta: Delta, layout: RecordLayout) -> UserRecord:
    """Return a record after changes: the bits of one that was built with them at once.

    Raises:
        TableOverflowError: if a sum leaves int32.
    """
    room = len(delta.rows) <= _FEW and _has_room(record.table, len(delta.rows))
    return _changed(record, delta, layout, _added if room else _added_with_care)


def _changed(
    record: UserRecord, delta: Delta, layout: RecordLayout, added: Callable[..., NDArray[np.int32]]
) -> UserRecord:
    rows, table = delta.rows, record.table
    if not len(rows):
        return replace(record, revision=delta.revision, watermark=delta.watermark)
    in_table, in_log = rows["in_table"], rows["in_log"].tolist()
    if layout.groups:
        places = rows["codes"] + np.arange(0, layout.rows, layout.buckets)
        vectors = rows["vector"] * in_table[:, None].astype(np.int32)
        table = added(table.reshape(layout.rows, -1), places, vectors).reshape(layout.shape)
    times, events, recent = _recent(record, delta, layout)
    return UserRecord(
        revision=delta.revision,
        watermark=delta.watermark,
        behaviours=record.behaviours + int(in_table.sum(dtype=np.int64)),
        table=table,
        recent_times=times,
        recent=recent,
        counters={
            name: _counted(*record.counters[name], values.tolist(), in_log)
            for name, values in zip(layout.counters, rows["counted"].T, strict=True)
        },
        events=events,
    )


def _packed(record: int, head: Head, rows: bytes) -> bytes:
    body = _REST.pack(record, head.revision, head.watermark) + rows
    return _START.pack(_MAGIC, isal_zlib.crc32(body)) + body


def _whole(delta: bytes | memoryview) -> bool:
    if len(delta) < _HEADER_BYTES:
        return False
    magic, checksum = _START.unpack_from(delta)
    body = memoryview(delta)[_START.size :]
    return bool(magic == _MAGIC and isal_zlib.crc32(body) == checksum)


def _check(data: bytes, end: int) -> memoryview:
    """Return the delta after a record that ends there."""
    delta = memoryview(data)[end:]
    if not _whole(delta):
        raise CorruptRecordError("what follows a record is not its delta; remove both")
    if _REST.unpack_from(delta, _START.size)[0] != record_checksum(data):
        raise CorruptRecordError("a record's delta belongs to another record; remove both")
    return delta


def _read(data: bytes, end: int, layout: RecordLayout) -> Delta:
    delta = _check(data, end)
    _, revision, watermark = _REST.unpack_from(delta, _START.size)
    kind, size = row_type(layout), len(delta) - _HEADER_BYTES
    if size % kind.itemsize or size > DELTA_LIMIT * kind.itemsize:
        raise CorruptRecordError("a record's delta has half a row or too many; remove both")
    rows = np.frombuffer(delta, kind, size // kind.itemsize, _HEADER_BYTES)
    return Delta(revision=revision, watermark=watermark, rows=rows)


def _added(
    table: NDArray[np.int32], places: NDArray[np.int64], vectors: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Add vectors to rows of a table, where no sum can leave int32.

    Args:
        table: `[G * B, D]`.
        places: `[K, G]`, rows of the table.
        vectors: `[K, D]`.
    """
    table = table.copy()
    for rows, vector in zip(places, vectors, strict=True):
        table[rows] += vector
    return table


def _added_with_care(
    table: NDArray[np.int32], places: NDArray[np.int64], vectors: NDArray[np.int32]
) -> NDArray[np.int32]:
    """As `_added`; raises `TableOverflowError` where a sum of all leaves int32."""
    increments = np.zeros(table.shape, np.int64)
    np.add.at(increments, places, vectors[:, None])
    sums: NDArray[np.int32] = add(table[None], increments[None])[0]
    return sums


def _has_room(table: NDArray[np.int32], count: int) -> bool:
    """Whether so many vectors can be added to any entry."""
    largest = max(int(table.max(initial=0)), -int(table.min(initial=0)))
    return largest <= _INT32.max - count * COMPONENT_LIMIT


def _recent(
    record: UserRecord, delta: Delta, layout: RecordLayout
) -> tuple[NDArray[np.int64], NDArray[np.uint64], dict[str, NDArray[Any]]]:
    """Times, orders and features of the latest events: of those that were, came and did not go.

    What leaves a log is its earliest, so no event that the record does not hold can come to be
    among them.
    """
    if not layout.recent:
        return record.recent_times, record.events[:0], record.recent
    if len(record.events) != len(record.recent_times):
        raise CorruptRecordError("a record that was not made from a log has a delta; remove both")
    rows = delta.rows[delta.rows["in_log"] != 0]
    times = np.concatenate([record.recent_times, rows["time"]])
    orders = np.concatenate([record.events, rows["order"]])
    there = np.concatenate([np.ones(len(record.events), np.bool_), rows["in_log"] > 0])
    last = np.lexsort((orders, times))  # stable: of an event that came and went, the last word ends
    same = (np.diff(times[last]) == 0) & (np.diff(orders[last]) == 0)
    last = last[there[last] & np.append(~same, True)]
    last = last[max(len(last) - layout.recent, 0) :]
    recent = {
        name: np.concatenate([record.recent[name], rows[f"recent.{name}"]])[last]
        for name, _ in layout.features
    }
    return times[last], orders[last], recent


def _counted(
    keys: NDArray[np.uint32], counts: NDArray[np.uint32], values: list[int], signs: list[int]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Count some values, 0 being none, more or less; keys stay in order, those of nothing go."""
    changes: dict[int, int] = {}
    for value, sign in zip(values, signs, strict=True):
        if value and sign:
            changes[value] = changes.get(value, 0) + sign
    if not changes:
        return keys, counts
    asked = np.array(sorted(changes), np.uint32)
    keys, counts, place = _with_keys(keys, counts, asked)
    total = counts[place] + np.array([changes[value] for value in asked.tolist()])
    counts[place] = total
    gone = place[total <= 0]
    return (np.delete(keys, gone), np.delete(counts, gone)) if len(gone) else (keys, counts)


def _with_keys(
    keys: NDArray[np.uint32], counts: NDArray[np.uint32], asked: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.int64]]:
    """Return keys with those asked for, counts of their own, and where those asked for are.

    A sort would be simpler, and forty times as slow for who has met tens of thousands of items.
    """
    place = keys.searchsorted(asked)
    new = keys.take(place, mode="clip") != asked if len(keys) else np.ones(len(asked), np.bool_)
    if not new.any():
        return keys, counts.copy(), place
    cuts = place[new].tolist()
    keys = _inserted(keys, cuts, asked[new])
    counts = _inserted(counts, cuts, np.zeros(len(cuts), np.uint32))
    return keys, counts, place + new.cumsum() - new


def _inserted(
    array: NDArray[np.uint32], cuts: list[int], values: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """Return an array with values before what is at the cuts, which ascend."""
    pieces = [array[: cuts[0]]]
    for number, (cut, end) in enumerate(pairwise([*cuts, len(array)])):
        pieces += values[number : number + 1], array[cut:end]
    return np.concatenate(pieces)
