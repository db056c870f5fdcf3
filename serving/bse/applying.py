"""Events into the log and into every kept model's tables, in one change of the store."""

import logging
from collections.abc import Mapping, Sequence
from enum import Enum

import numpy as np

from hashtab.serving.bse.kept import Turnover, table_change, turnover
from hashtab.serving.bse.model import Encoded, Model
from hashtab.serving.bse.record_change import Part, built, changed
from hashtab.serving.store import (
    Change,
    CorruptRecordError,
    Event,
    ForeignRecordError,
    Head,
    Plan,
    TableOverflowError,
    User,
    UserRecord,
    pack,
    unpack,
)

_log = logging.getLogger(__name__)
NOTHING = Head()


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
    for fingerprint, model in models.items():
        building = plan.models[fingerprint.hex()].state == "building"
        # A user with events but without a table waits for the rebuild, which reads the log whole.
        waits = {user for user in turnovers if building and heads[user] is not None}
        change.put_records(fingerprint, _Records(change, model, turnovers, after).made(waits))
    for user, turned in turnovers.items():
        change.remove(turned.removed)
        change.add(turned.added)
        change.put_head(user, after[user])


def _head(change: Change, user: User, head: Head, turned: Turnover) -> Head:
    left = change.earliest(user, len(turned.removed) + 1)[len(turned.removed) :]
    times = [event.time for event in (*left, *turned.added[:1])]
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
        after: Mapping[User, Head],
    ) -> None:
        self._change = change
        self._model = model
        self._turnovers = turnovers
        self._after = after

    def made(self, waits: set[User]) -> dict[User, bytes | None]:
        """Return the bytes of each record; None where no table can hold it.

        Args:
            waits: users who, if they have no record, are to have none yet.
        """
        users = list(self._turnovers)
        stored = self._stored(users)
        tables = {
            user: table_change(self._change, user, self._turnovers[user], self._model.limit)
            for user in users
            if stored[user] is not None
        }
        parts = _Parts(
            self._model,
            [
                part
                for user, (gained, lost) in tables.items()
                for part in (
                    gained,
                    lost,
                    self._turnovers[user].added,
                    self._turnovers[user].removed,
                )
            ],
        )
        found: dict[User, bytes | None] = {}
        for user in users:
            record = stored[user]
            if record is None and user in waits:
                continue
            four = [next(parts) for _ in range(4)] if record is not None else []
            found[user] = self._record(user, record, four)
        return found

    def _stored(self, users: Sequence[User]) -> dict[User, UserRecord | None]:
        """Return records as they are; an empty one where the user is new, None where it is lost."""
        found: dict[User, UserRecord | None] = {}
        records = self._change.records(self._model.fingerprint, users)
        for user, data in zip(users, records, strict=True):
            new = self._turnovers[user].before == 0
            found[user] = UserRecord.empty(self._model.layout) if new else None
            if data is not None and not new:
                try:
                    found[user] = unpack(data, self._model.layout)
                except (CorruptRecordError, ForeignRecordError) as error:
                    _log.warning("user %r: %s; built again from the log", user, error)
                    found[user] = None
        return found

    def _record(self, user: User, record: UserRecord | None, parts: list[Part]) -> bytes | None:
        turned, head = self._turnovers[user], self._after[user]
        model = self._model
        if record is not None:
            gained, lost, added, removed = parts
            try:
                made = changed(
                    model,
                    record,
                    gained=gained,
                    lost=lost,
                    added=added,
                    removed=removed,
                    head=head,
                )
                return pack(made, model.layout)
            except TableOverflowError:
                pass  # perhaps on the way only: the sum of all decides
        gone = {event.id for event in turned.removed}
        whole = [e for e in self._change.events(user) if e.id not in gone] + turned.added
        return from_log(model, user, whole, head)


def from_log(model: Model, user: User, events: Sequence[Event], head: Head) -> bytes | None:
    """Return the record of all events of a user's log; None where no table can hold it."""
    ordered = sorted(events, key=lambda event: event.order)
    try:
        return pack(built(model, ordered, head), model.layout)
    except TableOverflowError as error:
        _log.warning("user %r has no table: %s", user, error)
        return None


class _Parts:
    """Lists of events, encoded in one call, given out one after another."""

    def __init__(self, model: Model, parts: list[Sequence[Event]]) -> None:
        every = {(e.user, e.id): e for part in parts for e in part}
        self._places = {key: place for place, key in enumerate(every)}
        self._encoded: Encoded = model.encode(list(every.values()))
        self._parts = iter(parts)

    def __next__(self) -> Part:
        events = next(self._parts)
        places = np.array([self._places[e.user, e.id] for e in events], np.int64)
        return Part(encoded=self._encoded, places=places, events=events)
