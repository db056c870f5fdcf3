"""One event of the log: what a user did, as it was said, and its bytes."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from hashtab.serving.store.errors import CorruptRecordError
from hashtab.serving.store.keys import User

SideValue = int | float | str | None

DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Event:
    """A behaviour with raw values, so that any model's encoders can read it.

    Args:
        user: who.
        id: names the event among the user's; a second one of the same id is a duplicate.
        time: microseconds since 1970 UTC.
        item: value of the item.
        side: side features by name.
    """

    user: User
    id: str
    time: int
    item: int | str
    side: dict[str, SideValue] = field(default_factory=dict)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for the id in keys."""
        return hashlib.blake2b(self.id.encode(), digest_size=DIGEST_BYTES).digest()

    @property
    def order(self) -> tuple[int, bytes]:
        """Events of a user are ordered by time, and those of one moment by their ids' digests.

        No order of arrival is left in it: whoever builds a table from the log finds the same order.
        """
        return self.time, self.digest


_Stored = tuple[str, int, int | str, dict[str, SideValue]]
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Stored).decode


def pack_event(event: Event) -> bytes:
    """Return the bytes of all but the user, which the key tells."""
    return _encode((event.id, event.time, event.item, event.side))


def unpack_event(user: User, data: bytes) -> Event:
    """Read what `pack_event` wrote.

    Raises:
        CorruptRecordError: if the bytes are not those of an event.
    """
    try:
        event_id, time, item, side = _decode(data)
    except msgspec.MsgspecError as error:
        raise CorruptRecordError(
            f"an event of user {user!r} in the log cannot be read ({error}); delete the user and "
            "replay their events"
        ) from error
    return Event(user=user, id=event_id, time=time, item=item, side=side)
