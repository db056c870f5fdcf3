"""What the BSE service takes and answers as JSON, and how it becomes events."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec

from hashtab.serving.bse.writer import microseconds
from hashtab.serving.http import HttpError
from hashtab.serving.store import Event, SideValue

_INT64 = msgspec.Meta(ge=-(2**63), le=2**63 - 1)
LATEST_US = 2**53  # that a Redis server orders exactly: the year 2255
_TIME = msgspec.Meta(ge=-LATEST_US, le=LATEST_US, description="microseconds since 1970 UTC")
MOST_EVENTS = 10_000  # of one request
_AHEAD_US = 86_400 * 10**6  # that a clock may be ahead of ours
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

LONGEST_USER = 120  # characters, which as UTF-8 fit into a key
Name = Annotated[int, _INT64] | Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_USER)]
Number = Annotated[int, _INT64] | float
Side = Annotated[str, msgspec.Meta(max_length=1000)]


class EventIn(msgspec.Struct, forbid_unknown_fields=True):
    """One behaviour, as it is sent.

    The id names it among its user's: sent again under the same id, it is not counted twice.
    """

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    user: Name
    item: Name
    time: Annotated[int, _TIME] | datetime
    side: Annotated[dict[str, Number | Side | None], msgspec.Meta(max_length=100)] = {}


class EventsIn(msgspec.Struct, forbid_unknown_fields=True):
    """One or many behaviours."""

    events: Annotated[list[EventIn], msgspec.Meta(min_length=1, max_length=MOST_EVENTS)]


class EventsOut(msgspec.Struct):
    """What became of the events, all of which are durable now."""

    accepted: int
    duplicate: int
    late: int
    late_ids: list[str] = []


class BundleIn(msgspec.Struct, forbid_unknown_fields=True):
    """A model whose tables are to be kept."""

    bundle: Annotated[str, msgspec.Meta(min_length=1)]


class ModelOut(msgspec.Struct):
    """A model whose tables are kept."""

    fingerprint: str
    bundle: str
    digest: str
    state: str
    since: str


class ModelsOut(msgspec.Struct):
    """All models whose tables are kept."""

    models: list[ModelOut]


class TableOut(msgspec.Struct):
    """A user's table of one model: how many behaviours are in it, and how full it is."""

    fingerprint: str
    behaviours: int
    buckets_filled: int
    buckets: int
    bytes: int
    revision: int


class EventOut(msgspec.Struct):
    """A behaviour of the log."""

    id: str
    item: int | str
    time: str
    side: dict[str, int | float | str | None]


class UserOut(msgspec.Struct):
    """What is kept of a user; events before the watermark come too late."""

    user: int | str
    events: int
    watermark: str | None
    tables: list[TableOut]
    recent: list[EventOut]


class ForgottenOut(msgspec.Struct):
    """What was forgotten of a user."""

    events: int
    tables: int


def to_events(events: Sequence[EventIn], text_users: bool | None) -> list[Event]:
    """Return events as the log holds them.

    Args:
        events: as they were sent.
        text_users: whether users must be text; None where no model says.

    Raises:
        HttpError: 422, naming the field that cannot be used.
    """
    latest = microseconds() + _AHEAD_US
    return [_event(event, i, text_users, latest) for i, event in enumerate(events)]


def _event(event: EventIn, place: int, text_users: bool | None, latest: int) -> Event:
    if text_users is not None and isinstance(event.user, str) != text_users:
        wanted = "text, in quotes" if text_users else "a whole number, without quotes"
        raise HttpError(
            422,
            f"the models know users as {wanted}, got {event.user!r}",
            field=f"events[{place}].user",
        )
    time = event.time if isinstance(event.time, int) else to_microseconds(event.time)
    if not -LATEST_US <= time <= LATEST_US:
        raise HttpError(422, f"the time {iso(time)} is out of range", field=f"events[{place}].time")
    if time > latest:
        raise HttpError(
            422,
            f"the time {iso(time)} is more than a day ahead; whole numbers are microseconds since "
            "1970 UTC",
            field=f"events[{place}].time",
        )
    side: dict[str, SideValue] = dict(event.side)
    return Event(user=event.user, id=event.id, time=time, item=event.item, side=side)


def to_microseconds(time: datetime) -> int:
    """Return a time, UTC where it names no zone, as microseconds since 1970 UTC."""
    aware = time if time.tzinfo else time.replace(tzinfo=UTC)
    return (aware - _EPOCH) // timedelta(microseconds=1)


def iso(time: int) -> str:
    """Return microseconds since 1970 UTC as ISO 8601, or as they are beyond the year 9999."""
    try:
        return (_EPOCH + timedelta(microseconds=time)).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return f"{time} microseconds"
