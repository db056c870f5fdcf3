"""What a user's record has changed by since it was written whole: small, and added when it is read.

A record may have 70 kB, of which an event changes a few rows. So writers add some 200 bytes to the
user's delta, and write the record anew once its delta has `DELTA_LIMIT` rows. A delta's bytes lie
under a key of their own; whoever reads gets them after those of the record.
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from hashtab.serving.store.errors import CorruptRecordError, TableOverflowError
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
"""Rows of a delta: each costs its readers microseconds, and spares writers a share of a record."""

_MAGIC = b"htud"
_START = struct.Struct("<4sI")  # magic, CRC-32 of all that follows
_REST = struct.Struct("<IQqQ")  # checksum of the record, then as in `Delta`
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
        events: in the log after them.
        rows: `[K]` of `row_type`, in any order; vectors stay below `COMPONENT_LIMIT`.
    """

    revision: int
    watermark: int
    events: int
    rows: NDArray[np.void]

    @classmethod
    def of(cls, head: Head, rows: NDArray[np.void]) -> Self:
        """Return the changes that bring a record to what the log says of its user."""
        return cls(revision=head.revision, watermark=head.watermark, events=head.events, rows=rows)


def first_delta(record: bytes, table: NDArray[np.int32], head: Head) -> bytes | None:
    """Return a delta without rows; None if the table might overflow by as many as it may get.

    Args:
        record: packed.
        table: of the record.
        head: of the log, as it is in the record.
    """
    if not _has_room(table):
        return None
    return _packed(record_checksum(record), head, b"")


def extended(delta: bytes, rows: NDArray[np.void], head: Head) -> bytes | None:
    """Return a delta with more rows; None if it is full or cannot be read.

    Args:
        delta: packed.
        rows: `[K]` of `row_type`.
        head: of the log after them.
    """
    if len(delta) + rows.nbytes > _HEADER_BYTES + DELTA_LIMIT * rows.itemsize or not _whole(delta):
        return None
    (record, *_) = _REST.unpack_from(delta, _START.size)
    return _packed(record, head, delta[_HEADER_BYTES:] + rows.tobytes())


def unpack(data: bytes, layout: RecordLayout) -> UserRecord:
    """Read a record and the delta after it.

    Args:
        data: as a store gives it.
        layout: of the record.

    Raises:
        CorruptRecordError: if the bytes are not those of a whole record, or its delta's are not.
        ForeignRecordError: if it is a record of another fingerprint, layout or format.
    """
    record, end = unpack_record(data, layout)
    if end == len(data):
        return record
    try:
        return changed(record, _read(data, end, layout), layout)
    except TableOverflowError as error:
        raise CorruptRecordError(f"a record and its delta do not fit: {error}") from error


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
    times, events, recent = _recent(record, delta, layout)
    in_table = delta.rows["in_table"]
    return UserRecord(
        revision=delta.revision,
        watermark=delta.watermark,
        behaviours=record.behaviours + int(in_table.sum(dtype=np.int64)),
        table=_table(record.table, delta.rows[in_table != 0]),
        recent_times=times,
        recent=recent,
        counters=_counters(record, delta.rows[delta.rows["in_log"] != 0], layout),
        events=events,
    )


def _packed(record: int, head: Head, rows: bytes) -> bytes:
    body = _REST.pack(record, head.revision, head.watermark, head.events) + rows
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
    _, revision, watermark, events = _REST.unpack_from(delta, _START.size)
    kind, size = row_type(layout), len(delta) - _HEADER_BYTES
    if size % kind.itemsize:
        raise CorruptRecordError("a record's delta has half a row; remove both")
    rows = np.frombuffer(delta, kind, size // kind.itemsize, _HEADER_BYTES)
    return Delta(revision=revision, watermark=watermark, events=events, rows=rows)


def _table(table: NDArray[np.int32], rows: NDArray[np.void]) -> NDArray[np.int32]:
    """Add the vectors of some events to a table, or subtract them."""
    codes, vectors = rows["codes"], rows["vector"] * rows["in_table"][:, None].astype(np.int32)
    groups = np.arange(len(table))
    if len(rows) <= DELTA_LIMIT and _has_room(table):
        table = table.copy()
        for code, vector in zip(codes, vectors, strict=True):
            table[groups, code] += vector
        return table
    increments = np.zeros(table.shape, np.int64)
    np.add.at(increments, (groups, codes), vectors[:, None])
    return add(table, increments)


def _has_room(table: NDArray[np.int32]) -> bool:
    largest = max(int(table.max(initial=0)), -int(table.min(initial=0)))
    return largest <= _INT32.max - DELTA_LIMIT * COMPONENT_LIMIT


def _recent(
    record: UserRecord, delta: Delta, layout: RecordLayout
) -> tuple[NDArray[np.int64], NDArray[np.uint64], dict[str, NDArray[Any]]]:
    """Times, orders and features of the latest events, those that were and those that are new."""
    new = delta.rows[delta.rows["in_log"] > 0]
    times = np.concatenate([record.recent_times, new["time"]])
    orders = np.concatenate([record.events, new["order"]])
    last = np.lexsort((orders, times))
    last = last[max(len(last) - min(layout.recent, delta.events), 0) :]
    recent = {
        name: np.concatenate([record.recent[name], new[f"recent.{name}"]])[last]
        for name, _ in layout.features
    }
    return times[last], orders[last], recent


def _counters(
    record: UserRecord, rows: NDArray[np.void], layout: RecordLayout
) -> dict[str, tuple[NDArray[np.uint32], NDArray[np.uint32]]]:
    """How often each value was met, after some more and some fewer."""
    counted, signs = rows["counted"], rows["in_log"].astype(np.int64)
    found = {}
    for place, name in enumerate(layout.counters):
        met = counted[:, place] > 0
        found[name] = _counted(*record.counters[name], counted[met, place], signs[met])
    return found


def _counted(
    keys: NDArray[np.uint32],
    counts: NDArray[np.uint32],
    values: NDArray[np.uint32],
    signs: NDArray[np.int64],
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Count some values more or less; keys stay in order, and those of nothing go."""
    asked, change = values, signs
    if len(asked) > 1:
        asked, which = np.unique(asked, return_inverse=True)
        change = np.zeros(len(asked), np.int64)
        np.add.at(change, which, signs)
    place = keys.searchsorted(asked)
    new = np.append(keys, np.uint32(0))[place] != asked  # a value is never 0
    if new.any():
        keys = np.concatenate([keys, asked[new]])
        order = keys.argsort(kind="stable")
        keys = keys[order]
        counts = np.concatenate([counts, np.zeros(new.sum(), np.uint32)])[order]
        place = keys.searchsorted(asked)
    total = counts.astype(np.int64)
    total[place] += change
    kept = total > 0
    if not kept.all():
        keys, total = keys[kept], total[kept]
    return keys, total.astype(np.uint32)
