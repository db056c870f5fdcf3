"""Events into the log and into every kept model's tables, in one change of the store."""

import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TypeAlias

import numpy as np

from hashtab.serving.bse.kept import Turnover, table_change, turnover
from hashtab.serving.bse.model import Model
from hashtab.serving.bse.record_change import EventChanges, Rows, built, delta_rows
from hashtab.serving.store import (
    DELTA_LIMIT,
    Change,
    CorruptRecordError,
    Delta,
    Event,
    ForeignRecordError,
    Head,
    Plan,
    TableOverflowError,
    User,
    UserRecord,
    changed,
    extended,
    first_delta,
    pack,
    split,
)

_log = logging.getLogger(__name__)
NOTHING = Head()
Stored: TypeAlias = tuple[UserRecord, Delta | None]


class Outcome(Enum):
    """What became of one event."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # the log had it already, or it came twice
    LATE = "late"  # older than what the log keeps of its user


def apply(
    change: Change, events: Sequence[Event], models: Mapping[bytes, Model], plan: Plan, now: int
) -> list[Outcome]:
    """Add events to the log and to the tables of models.

    What log and tables hold in the end does not depend on the order of events, nor on how they
    were cut into changes.

    Args:
        change: of a store, opened for all users of these events.
        events: in any order, with duplicates.
        models: opened, one for each of the plan.
        plan: as the change reads it.
        now: microseconds, the moment that a window ends at.

    Returns:
        What became of each event.
    """
    fresh = _fresh(change, events)
    by_user: dict[User, list[Event]] = {}
    for place in fresh:
        by_user.setdefault(events[place].user, []).append(events[place])
    heads = dict(zip(by_user, change.heads(list(by_user)), strict=True))
    turnovers = {
        user: turnover(change, user, heads[user] or NOTHING, arriving, plan, now)
        for user, arriving in by_user.items()
    }
    write(change, turnovers, heads, models, plan)
    outcomes = [Outcome.DUPLICATE] * len(events)
    refused = {(e.user, e.id) for turned in turnovers.values() for e in turned.refused}
    for place in fresh:
        late = (events[place].user, events[place].id) in refused
        outcomes[place] = Outcome.LATE if late else Outcome.ACCEPTED
    return outcomes


def _fresh(change: Change, events: Sequence[Event]) -> list[int]:
    """Return the places of events that the log does not know, each at its first place."""
    first: dict[tuple[User, str], int] = {}
    for place, event in enumerate(events):
        first.setdefault((event.user, event.id), place)
    places = list(first.values())
    known = change.known([events[place] for place in places])
    return [place for place, there in zip(places, known, strict=True) if not there]


def expire(
    change: Change, users: Sequence[User], models: Mapping[bytes, Model], plan: Plan, now: int
) -> int:
    """Take out of log and tables what the plan keeps no longer; return how many events."""
    heads = dict(zip(users, change.heads(users), strict=True))
    turnovers = {
        user: turnover(change, user, head, [], plan, now)
        for user, head in heads.items()
        if head is not None
    }
    write(change, turnovers, heads, models, plan)
    return sum(len(turned.removed) for turned in turnovers.values())


def write(
    change: Change,
    turnovers: Mapping[User, Turnover],
    heads: Mapping[User, Head | None],
    models: Mapping[bytes, Model],
    plan: Plan,
) -> None:
    """Write what each user's log gains and loses, and the records that follow from it."""
    turnovers = {user: turned for user, turned in turnovers.items() if not turned.idle}
    if not turnovers:
        return
    after = {u: _head(change, u, heads[u] or NOTHING, turned) for u, turned in turnovers.items()}
    both = {user: (heads[user] or NOTHING, after[user]) for user in turnovers}
    for fingerprint, model in models.items():
        building = plan.models[fingerprint.hex()].state == "building"
        # A user with events but without a table waits for the rebuild, which reads the log whole.
        waits = {user for user in turnovers if building and heads[user] is not None}
        _Records(change, model, turnovers, both).write(waits)
    for user, turned in turnovers.items():
        change.remove(turned.removed)
        change.add(turned.added)
        change.put_head(user, after[user])


def _head(change: Change, user: User, head: Head, turned: Turnover) -> Head:
    times = [event.time for event in turned.added[:1]]
    if turned.removed:
        left = change.earliest(user, len(turned.removed) + 1)[len(turned.removed) :]
        times += [event.time for event in left]
    elif head.events:
        times.append(head.earliest)
    gone = [event.time for event in (*turned.removed[-1:], *turned.refused[-1:])]
    return Head(
        events=turned.after,
        watermark=max(head.watermark, *gone) if gone else head.watermark,
        earliest=min(times, default=0),
        revision=head.revision + 1,
    )


class _Records:
    """The records of one model after a change of several users' logs."""

    def __init__(
        self,
        change: Change,
        model: Model,
        turnovers: Mapping[User, Turnover],
        heads: Mapping[User, tuple[Head, Head]],
    ) -> None:
        self._change = change
        self._model = model
        self._turnovers = turnovers
        self._heads = heads  # before and after

    def write(self, waits: set[User]) -> None:
        """Write deltas, and records anew where there is no delta that takes the change.

        Args:
            waits: users who, if they have no record, are to have none yet.
        """
        deltas = self._deltas()
        stored = self._stored([user for user in self._turnovers if user not in deltas], waits)
        rows = self._rows([*deltas, *(user for user, found in stored.items() if found)])
        longer = {user: self._extended(user, delta, rows[user]) for user, delta in deltas.items()}
        stored |= self._stored([user for user, delta in longer.items() if delta is None], set())
        records: dict[User, bytes | None] = {}
        first: dict[User, bytes | None] = {}
        for user, found in stored.items():
            records[user], first[user] = self._written(user, found, rows.get(user))
        self._change.put_records(self._model.fingerprint, records, first)
        self._change.put_deltas(
            self._model.fingerprint, {user: delta for user, delta in longer.items() if delta}
        )

    def _deltas(self) -> dict[User, bytes]:
        """Return the deltas that may take their user's change."""
        users = [user for user, turned in self._turnovers.items() if turned.before]
        users = [user for user in users if not self._due(user)]
        found = self._change.deltas(self._model.fingerprint, users)
        return {user: delta for user, delta in zip(users, found, strict=True) if delta is not None}

    def _due(self, user: User) -> bool:
        """Whether a record is written anew now: users take turns, whenever their events come."""
        return (hash(user) + self._heads[user][1].revision) % DELTA_LIMIT == 0

    def _rows(self, users: Sequence[User]) -> dict[User, Rows | None]:
        """Return what changes in each user's record; None where no table can hold it."""
        parts = {}
        for user in users:
            turned = self._turnovers[user]
            gained, lost = table_change(self._change, user, turned, self._model.limit)
            parts[user] = EventChanges(
                gained=gained, lost=lost, added=turned.added, removed=turned.removed
            )
        return delta_rows(self._model, parts)

    def _extended(self, user: User, delta: bytes, rows: Rows | None) -> bytes | None:
        return None if rows is None else extended(delta, rows, *self._heads[user])

    def _stored(self, users: Sequence[User], waits: set[User]) -> dict[User, Stored | None]:
        """Return records as they are; an empty one where the user is new, None where it is lost."""
        found: dict[User, Stored | None] = {}
        records = self._change.records(self._model.fingerprint, users)
        for user, data in zip(users, records, strict=True):
            if data is None and user in waits:
                continue
            new = self._turnovers[user].before == 0
            found[user] = (UserRecord.empty(self._model.layout), None) if new else None
            if data is not None and not new:
                found[user] = self._read(user, data)
        return found

    def _read(self, user: User, data: bytes) -> Stored | None:
        """Read a record, None if it is damaged or lacks what the log had before this change."""
        try:
            record, delta = split(data, self._model.layout)
        except (CorruptRecordError, ForeignRecordError) as error:
            _log.warning("user %r: %s; built again from the log", user, error)
            return None
        if (delta or record).revision != self._heads[user][0].revision:
            _log.warning(
                "user %r: a record lacks its latest changes; built again from the log", user
            )
            return None
        return record, delta

    def _written(
        self, user: User, stored: Stored | None, rows: Rows | None
    ) -> tuple[bytes | None, bytes | None]:
        """Return the bytes of a record and its first delta; None where no table can hold it."""
        turned, (_, head), layout = self._turnovers[user], self._heads[user], self._model.layout
        if stored is None or rows is None:
            gone = {event.id for event in turned.removed}
            whole = [e for e in self._change.events(user) if e.id not in gone] + turned.added
            return from_log(self._model, user, whole, head), None
        record, delta = stored
        if delta is not None:
            rows = np.concatenate([delta.rows, rows])
        try:
            made = changed(record, Delta.of(head, rows), layout)
        except TableOverflowError as error:
            _log.warning("user %r has no table: %s", user, error)
            return None, None
        data = pack(made, layout)
        return data, first_delta(data, made.table, head)


def from_log(model: Model, user: User, events: Sequence[Event], head: Head) -> bytes | None:
    """Return the record of all events of a user's log; None where no table can hold it."""
    ordered = sorted(events, key=lambda event: event.order)
    try:
        return pack(built(model, ordered, head), model.layout)
    except TableOverflowError as error:
        _log.warning("user %r has no table: %s", user, error)
        return None
