"""What events do to a user's record: as rows of its delta, or as a record made of all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hashtab.serving.bse.model import Model
from hashtab.serving.store import Event, Head, User, UserRecord, row_type

Rows: TypeAlias = NDArray[np.void]


@dataclass(frozen=True, kw_only=True)
class EventChanges:
    """Events that come into a user's log and table, or leave them.

    Args:
        gained: what the table gains.
        lost: what the table loses.
        added: what the log gains.
        removed: what the log loses, its earliest.
    """

    gained: Sequence[Event]
    lost: Sequence[Event]
    added: Sequence[Event]
    removed: Sequence[Event]

    def signs(self) -> dict[str, tuple[Event, int, int]]:
        """Return of each event, by id, what it does to the table and to the log."""
        found = {e.id: (e, 0, 1) for e in self.added} | {e.id: (e, 0, -1) for e in self.removed}
        for events, sign in ((self.gained, 1), (self.lost, -1)):
            for event in events:
                _, _, in_log = found.get(event.id, (event, 0, 0))
                found[event.id] = event, sign, in_log
        return found


def delta_rows(model: Model, changes: Mapping[User, EventChanges]) -> dict[User, Rows | None]:
    """Return the rows of users' deltas, encoded in one call; None where no table can hold one."""
    by_user = {user: list(change.signs().values()) for user, change in changes.items()}
    every = [triple for triples in by_user.values() for triple in triples]
    rows, holds = _rows(model, every)
    held = holds.tolist()
    found: dict[User, Rows | None] = {}
    end = 0
    for user, triples in by_user.items():
        own = slice(end, end + len(triples))
        end = own.stop
        found[user] = rows[own] if all(held[own]) else None
    return found


def _rows(
    model: Model, changes: Sequence[tuple[Event, int, int]]
) -> tuple[Rows, NDArray[np.bool_]]:
    events = [event for event, _, _ in changes]
    encoded = model.encode(events)
    rows = np.zeros(len(events), row_type(model.layout))
    rows["time"] = [event.time for event in events]
    rows["order"] = _order(events)
    rows["in_table"] = [in_table for _, in_table, _ in changes]
    rows["in_log"] = [in_log for _, _, in_log in changes]
    rows["codes"], rows["vector"] = encoded.codes, encoded.vectors
    for place, name in enumerate(model.layout.counters):
        rows["counted"][:, place] = model.bundle.counted(name)[encoded.rows]
    for name, _ in model.layout.features:
        rows[f"recent.{name}"] = encoded.behaviours[name]
    return rows, encoded.held | (rows["in_table"] == 0)


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


def _order(events: Sequence[Event]) -> NDArray[np.uint64]:
    """What orders events of one moment: the first half of their ids' digests."""
    return np.array([int.from_bytes(event.digest[:8], "big") for event in events], np.uint64)
