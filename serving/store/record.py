"""One user's record and its bytes: table, recent behaviours, counters and recent event ids.

All is little endian and lies one after another: a header of 72 bytes with a checksum over the rest,
int64 times of the recent behaviours, uint64 event ids, the length of each counter, table rows,
feature columns, each counter's keys and counts, and a bitmap of the table's non-empty rows where
leaving out the empty ones saves bytes. Equal records have equal bytes.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from hashtab.serving.store.errors import CorruptRecordError, ForeignRecordError, StoreError
from hashtab.serving.store.keys import check_fingerprint

Array = NDArray[Any]

MAGIC = b"htur"
FORMAT = 2
RECENT_LIMIT = 65_535

_START = struct.Struct("<4sI")  # magic, CRC-32 of all that follows
_REST = struct.Struct("<II8sQQqQIIII")  # Header, from `format` on
HEADER_BYTES = _START.size + _REST.size

_INT32, _INT64 = np.dtype("<i4"), np.dtype("<i8")
_UINT8, _UINT32, _UINT64 = np.dtype("u1"), np.dtype("<u4"), np.dtype("<u8")
FEATURE_TYPES = {"int32": _INT32, "float32": np.dtype("<f4")}


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """What every record of one fingerprint holds.

    Args:
        fingerprint: 8 bytes, of the model and all that decides what a table means.
        groups: G, hash groups of the table; 0 means that there is no table.
        buckets: B, buckets of a group.
        size: D, components of a row.
        recent: most recent behaviours kept, 0 to 65535.
        features: name and type of each column of the recent behaviours.
        counters: names of the counters.

    Raises:
        StoreError: naming the value that is out of range.
    """

    fingerprint: bytes
    groups: int
    buckets: int
    size: int
    recent: int
    features: tuple[tuple[str, Literal["int32", "float32"]], ...]
    counters: tuple[str, ...]

    def __post_init__(self) -> None:
        check_fingerprint(self.fingerprint)
        if self.groups < 0 or (self.groups > 0 and min(self.buckets, self.size) < 1):
            raise StoreError(
                "groups, buckets and size must be positive, or groups 0 for no table, got "
                f"{self.groups}, {self.buckets} and {self.size}"
            )
        if not 0 <= self.recent <= RECENT_LIMIT:
            raise StoreError(f"recent must lie in 0 to {RECENT_LIMIT}, got {self.recent}")
        for name, kind in self.features:
            if kind not in FEATURE_TYPES:
                raise StoreError(f"feature {name!r} must be int32 or float32, got {kind!r}")
        for what, names in (("features", self._feature_names), ("counters", self.counters)):
            if len(set(names)) < len(names):
                raise StoreError(f"names of {what} must differ, got {names}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a table, `[G, B, D]`."""
        return self.groups, self.buckets, self.size

    @property
    def rows(self) -> int:
        """Rows of a table, G times B."""
        return self.groups * self.buckets

    @cached_property
    def digest(self) -> int:
        """32 bits of all but the fingerprint, which tell a record of another layout."""
        parts = (self.shape, self.recent, self.features, self.counters)
        return isal_zlib.crc32(repr(parts).encode())

    @property
    def _feature_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.features)


@dataclass(frozen=True, kw_only=True, eq=False)
class UserRecord:
    """What is stored of one user. Two are equal if their `pack`ed bytes are.

    Args:
        revision: changes of the user; where a log is kept, that of the user's head.
        watermark: microseconds since 1970 UTC; every event strictly before it is in the record
            or was reported late.
        behaviours: in the table now.
        table: `[G, B, D]` int32 in fixed point of 2^-16.
        recent_times: `[R]` int64, microseconds since 1970 UTC of the most recent behaviours, in
            time order, R at most the layout's `recent`.
        recent: `[R]` by feature, of the layout's types.
        counters: by name, `[K]` uint32 keys, ascending, and `[K]` uint32 counts.
        events: `[E]` uint64, ids of recent events, oldest first: what tells an event delivered
            twice. Empty in a record that was built from a log at once.
    """

    revision: int
    watermark: int
    behaviours: int
    table: NDArray[np.int32]
    recent_times: NDArray[np.int64]
    recent: dict[str, Array]
    counters: dict[str, tuple[NDArray[np.uint32], NDArray[np.uint32]]]
    events: NDArray[np.uint64]

    @classmethod
    def empty(cls, layout: RecordLayout, watermark: int = 0) -> "UserRecord":
        """Record of a user without any behaviour."""
        none = np.empty(0, np.uint32)
        return cls(
            revision=0,
            watermark=watermark,
            behaviours=0,
            table=np.zeros(layout.shape, np.int32),
            recent_times=np.empty(0, np.int64),
            recent={name: np.empty(0, FEATURE_TYPES[kind]) for name, kind in layout.features},
            counters=dict.fromkeys(layout.counters, (none, none)),
            events=np.empty(0, np.uint64),
        )


class Header(NamedTuple):
    """A record's header after magic and checksum; the last four are lengths of what follows."""

    format: int
    layout: int
    fingerprint: bytes
    size: int  # bytes of the record, after which its delta may follow
    revision: int
    watermark: int
    behaviours: int
    rows: int  # stored rows of the table: all of them, or those that the bitmap names
    recent: int
    events: int
    counted: int  # keys of all counters together


def pack(record: UserRecord, layout: RecordLayout) -> bytes:
    """Bytes of a record; equal records give equal bytes.

    Raises:
        StoreError: naming the part of the record that does not fit the layout.
    """
    table = _fitting("table", record.table, _INT32, layout.shape)
    rows, bitmap = _without_empty_rows(table.reshape(layout.rows, -1) if layout.rows else table)
    times, *columns = _recent(record, layout)
    counters = _counters(record, layout)
    lengths = np.array([len(keys) for keys in counters[::2]], _UINT32)
    events = _fitting("events", record.events, _UINT64, (len(record.events),))
    sections = (times, events, lengths, rows, *columns, *counters, bitmap)
    try:
        header = _REST.pack(
            FORMAT,
            layout.digest,
            layout.fingerprint,
            HEADER_BYTES + sum(section.nbytes for section in sections),
            record.revision,
            record.watermark,
            record.behaviours,
            len(rows),
            len(times),
            len(events),
            sum(map(len, counters[::2])),
        )
    except struct.error as error:
        raise StoreError(
            "revision and behaviours must be unsigned and watermark a signed integer of 64 bits, "
            f"got {record.revision!r}, {record.behaviours!r} and {record.watermark!r}"
        ) from error
    body = b"".join([header, *(section.data for section in sections)])
    return _START.pack(MAGIC, isal_zlib.crc32(body)) + body


def unpack_record(data: bytes, layout: RecordLayout) -> tuple[UserRecord, int]:
    """Read a record without what may follow it, and say where it ends.

    Its arrays are read-only views of `data` wherever they can be.

    Raises:
        CorruptRecordError: if the bytes are not those of a whole record.
        ForeignRecordError: if it is a record of another fingerprint, layout or format.
    """
    header = open_record(data, layout.fingerprint)
    if header.layout != layout.digest:
        raise ForeignRecordError(
            f"a record of fingerprint {layout.fingerprint.hex()} has another layout than its "
            "model; drop the fingerprint and encode its users again"
        )
    _check_lengths(header, layout)
    sections = _Sections(data, HEADER_BYTES)
    times = sections.take(_INT64, header.recent)
    events = sections.take(_UINT64, header.events)
    lengths = sections.take(_UINT32, len(layout.counters))
    if lengths.sum() != header.counted:
        raise CorruptRecordError("a record's counters have impossible lengths; remove it")
    rows = sections.take(_INT32, header.rows * layout.size).reshape(header.rows, layout.size)
    recent = {
        name: sections.take(FEATURE_TYPES[kind], header.recent) for name, kind in layout.features
    }
    counters = {
        name: (sections.take(_UINT32, length), sections.take(_UINT32, length))
        for name, length in zip(layout.counters, lengths.tolist(), strict=True)
    }
    record = UserRecord(
        revision=header.revision,
        watermark=header.watermark,
        behaviours=header.behaviours,
        table=_with_empty_rows(rows, sections, layout),
        recent_times=times,
        recent=recent,
        counters=counters,
        events=events,
    )
    return record, header.size


def record_checksum(data: bytes) -> int:
    """Return the checksum that a record begins with."""
    return int(_START.unpack_from(data)[1])


def open_record(data: bytes, fingerprint: bytes) -> Header:
    """Check that `data` begins with a whole record of a fingerprint; return its header.

    Raises:
        CorruptRecordError: if the bytes are not those of a whole record.
        ForeignRecordError: if it is a record of another fingerprint or format.
    """
    if len(data) < HEADER_BYTES:
        raise CorruptRecordError(f"a record has only {len(data)} bytes; remove it")
    magic, checksum = _START.unpack_from(data)
    if magic != MAGIC:
        raise CorruptRecordError(f"a record starts with {magic!r} and not {MAGIC!r}; remove it")
    header = Header._make(_REST.unpack_from(data, _START.size))
    # What another format holds after its record is not known here.
    size = header.size if header.format == FORMAT else len(data)
    if size > len(data) or isal_zlib.crc32(memoryview(data)[_START.size : size]) != checksum:
        raise CorruptRecordError("a record's checksum does not fit its bytes; remove it")
    if header.format != FORMAT:
        raise ForeignRecordError(
            f"a record has format {header.format}, this hashtab reads {FORMAT}; install the one "
            "that wrote it, or drop its fingerprint and encode the users again"
        )
    if header.fingerprint != fingerprint:
        raise ForeignRecordError(
            f"a record belongs to fingerprint {header.fingerprint.hex()}, not "
            f"{fingerprint.hex()}; encode this user with the model that is asked"
        )
    return header


def _check_lengths(header: Header, layout: RecordLayout) -> None:
    bitmap = _bitmap_bytes(layout.rows) if header.rows < layout.rows else 0
    words = (
        len(layout.counters)
        + header.rows * layout.size
        + header.recent * len(layout.features)
        + header.counted * 2
    )
    expected = HEADER_BYTES + 8 * (header.recent + header.events) + 4 * words + bitmap
    if header.size != expected or header.rows > layout.rows or header.recent > layout.recent:
        raise CorruptRecordError(
            f"a record has {header.size} bytes, {header.rows} rows and {header.recent} recent "
            "behaviours, which do not fit each other or the layout; remove it"
        )


class _Sections:
    """Arrays that lie one after another, as views."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._data = data
        self._offset = offset

    def take(self, dtype: np.dtype[Any], count: int) -> Array:
        view: Array = np.frombuffer(self._data, dtype, count, self._offset)
        self._offset += view.nbytes
        return view


def _bitmap_bytes(rows: int) -> int:
    return (rows + 7) // 8


def _without_empty_rows(table: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Non-empty rows and their bitmap, or all rows and no bitmap where that is not longer."""
    none = np.empty(0, np.uint8)
    if not table.size:
        return table, none
    filled = np.bitwise_or.reduce(table, axis=1) != 0
    rows = filled.nonzero()[0]
    saved = (len(table) - len(rows)) * table.shape[1] * table.itemsize
    if saved <= _bitmap_bytes(len(table)):
        return table, none
    return table.take(rows, axis=0), np.packbits(filled)


def _with_empty_rows(
    rows: NDArray[np.int32], sections: _Sections, layout: RecordLayout
) -> NDArray[np.int32]:
    if len(rows) == layout.rows:
        return rows.reshape(layout.shape)
    bitmap = sections.take(_UINT8, _bitmap_bytes(layout.rows))
    filled = np.unpackbits(bitmap, count=layout.rows).nonzero()[0]
    if len(filled) != len(rows):
        raise CorruptRecordError(
            "a record's bitmap does not name as many rows as it has; remove it"
        )
    table = np.zeros((layout.rows, layout.size), np.int32)
    table[filled] = rows
    return table.reshape(layout.shape)


def _recent(record: UserRecord, layout: RecordLayout) -> list[Array]:
    """Times of the recent behaviours, then each feature column in the layout's order."""
    count = len(record.recent_times)
    times = _fitting("recent_times", record.recent_times, _INT64, (count,))
    if count > layout.recent:
        raise StoreError(f"recent_times must have at most {layout.recent} entries, got {count}")
    if (times[1:] < times[:-1]).any():
        raise StoreError("recent_times must be in time order; sort the recent behaviours")
    _check_names("recent", record.recent, [name for name, _ in layout.features])
    columns = [
        _fitting(f"recent[{name!r}]", record.recent[name], FEATURE_TYPES[kind], (count,))
        for name, kind in layout.features
    ]
    return [times, *columns]


def _counters(record: UserRecord, layout: RecordLayout) -> list[Array]:
    """Keys and counts of each counter, in the layout's order."""
    _check_names("counters", record.counters, layout.counters)
    parts: list[Array] = []
    for name in layout.counters:
        keys, counts = record.counters[name]
        parts.append(_fitting(f"counters[{name!r}] keys", keys, _UINT32, (len(keys),)))
        parts.append(_fitting(f"counters[{name!r}] counts", counts, _UINT32, (len(keys),)))
        if (keys[1:] <= keys[:-1]).any():
            raise StoreError(f"counters[{name!r}] keys must ascend; sort them")
    return parts


def _check_names(part: str, found: dict[str, Any], names: Sequence[str]) -> None:
    if len(found) != len(names) or any(name not in found for name in names):
        raise StoreError(f"{part} must have the entries {list(names)}, got {sorted(found)}")


def _fitting(name: str, array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if array.dtype != dtype or array.shape != shape:
        raise StoreError(
            f"{name} must be {dtype.name} of shape {shape}, got {array.dtype} of {array.shape}"
        )
    return np.ascontiguousarray(array)
