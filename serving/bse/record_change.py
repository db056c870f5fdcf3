"""A user's record brought up to date by what arrived and what left, to the bits of a new one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashtab.features.storage import Array
from hashtab.serving.bse.model import Encoded, Model
from hashtab.serving.store import Event, Head, TableOverflowError, UserRecord

_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some events of a user among those that were encoded together.

    Args:
        encoded: of many events.
        places: `[L]`, where these events are among them.
        events: themselves, in order.
    """

    encoded: Encoded
    places: NDArray[np.int64]
    events: Sequence[Event]


def changed(
    model: Model,
    record: UserRecord,
    *,
    gained: Part,
    lost: Part,
    added: Part,
    removed: Part,
    head: Head,
) -> UserRecord:
    """Return a record after a change of its user's log.

    Args:
        model: of the record.
        record: before.
        gained: what the table gains.
        lost: what the table loses.
        added: what the log gains.
        removed: what the log loses, its earliest.
        head: of the log after it.

    Raises:
        TableOverflowError: if a sum leaves int32, or a vector is none that a table holds.
    """
    times, events, recent = _recent(model, record, added, head.events)
    return UserRecord(
        revision=head.revision,
        watermark=head.watermark,
        behaviours=record.behaviours + len(gained.places) - len(lost.places),
        table=_table(record.table, gained, lost),
        recent_times=times,
        recent=recent,
        counters=_counters(model, record, added, removed),
        events=events,
    )


def built(model: Model, events: Sequence[Event], head: Head) -> UserRecord:
    """Return the record of all events of a user's log, in order: what any way to it must come to.

    Raises:
        TableOverflowError: if a sum leaves int32, or a vector is none that a table holds.
    """
    rows = model.rows(events)
    times = np.array([event.time for event in events], np.int64)
    record = model.bundle.record(model.behaviours(events, rows), times, rows, head.watermark)
    kept = events[max(len(events) - model.layout.recent, 0) :]
    return UserRecord(
        revision=head.revision,
        watermark=head.watermark,
        behaviours=record.behaviours,
        table=record.table,
        recent_times=record.recent_times,
        recent=record.recent,
        counters=record.counters,
        events=_order(kept),
    )


def _table(table: NDArray[np.int32], gained: Part, lost: Part) -> NDArray[np.int32]:
    table = table.copy()
    groups = np.arange(len(table))
    for part, sign in ((gained, 1), (lost, -1)):
        if not part.encoded.held[part.places].all():
            raise TableOverflowError("a behaviour's vector has a component that no table holds")
        for place in part.places:
            code = part.encoded.codes[place]
            rows = table[groups, code] + sign * part.encoded.vectors[place].astype(np.int64)
            if rows.size and (rows.max() > _INT32.max or rows.min() < _INT32.min):
                raise TableOverflowError("a table's entry leaves int32")
            table[groups, code] = rows
    return table


def _order(events: Sequence[Event]) -> NDArray[np.uint64]:
    """What orders events of one moment: the first half of their ids' digests."""
    return np.array([int.from_bytes(event.digest[:8], "big") for event in events], np.uint64)


def _recent(
    model: Model, record: UserRecord, added: Part, after: int
) -> tuple[NDArray[np.int64], NDArray[np.uint64], dict[str, Array]]:
    """Times, orders and features of the latest events, those that were and those that are new."""
    times = np.array([event.time for event in added.events], np.int64)
    times = np.concatenate([record.recent_times, times])
    orders = np.concatenate([record.events, _order(added.events)])
    last = np.lexsort((orders, times))
    last = last[max(len(last) - min(model.layout.recent, after), 0) :]
    recent = {}
    for name, dtype in model.layout.features:
        new = added.encoded.behaviours[name][added.places].astype(dtype)
        recent[name] = np.concatenate([record.recent[name], new])[last]
    return times[last], orders[last], recent


def _counters(
    model: Model, record: UserRecord, added: Part, removed: Part
) -> dict[str, tuple[NDArray[np.uint32], NDArray[np.uint32]]]:
    """How often each value was met, after some more and some fewer."""
    rows = np.concatenate([added.encoded.rows[added.places], removed.encoded.rows[removed.places]])
    signs = np.repeat([1, -1], [len(added.places), len(removed.places)])
    found = {}
    for name in model.layout.counters:
        values = model.bundle.counted(name)[rows]
        met = values > 0
        found[name] = _counted(*record.counters[name], values[met], signs[met])
    return found


def _counted(
    keys: NDArray[np.uint32],
    counts: NDArray[np.uint32],
    values: NDArray[np.int64],
    signs: NDArray[np.int64],
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Count some values more or less; keys stay in order, and those of nothing go."""
    asked, change = values.astype(np.uint32), signs
    if len(asked) > 1:
        asked, which = np.unique(asked, return_inverse=True)
        change = np.zeros(len(asked), np.int64)
        np.add.at(change, which, signs)
    place = keys.searchsorted(asked)
    new = np.append(keys, 0)[place] != asked  # a value is never 0
    if new.any():
        counts = np.insert(counts, place[new], 0)
        keys = np.insert(keys, place[new], asked[new])
        place = keys.searchsorted(asked)
    total = counts.astype(np.int64)
    total[place] += change
    kept = total > 0
    if not kept.all():
        keys, total = keys[kept], total[kept]
    return keys, total.astype(np.uint32)
