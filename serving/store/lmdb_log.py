"""The event log in an LMDB environment: keys of one user lie together, in the order of events."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice, takewhile
from typing import TYPE_CHECKING, TypeAlias

from hashtab.serving.store.events import Event, pack_event, unpack_event
from hashtab.serving.store.keys import User, user_key
from hashtab.serving.store.log import (
    EVENT,
    ID,
    LOG,
    USER,
    Change,
    head_key,
)

if TYPE_CHECKING:
    import lmdb

Transaction: TypeAlias = "lmdb.Transaction[bytes]"

_TIME = struct.Struct(">Q")
_OFFSET = 1 << 63  # moves int64 to uint64, whose big-endian bytes sort as numbers
_AFTER = b"\xff" * 25  # later than any time and id


@lru_cache(maxsize=8192)
def _prefix(user: User) -> bytes:
    """Begin of the keys of a user's events and of their ids, which lie on neighbouring pages.

    A digest stands for the user, whose name may be too long for such a key.
    """
    return LOG + USER + hashlib.blake2b(user_key(LOG, user), digest_size=16).digest()


class LmdbChange(Change):
    """A change in one write transaction, or what a read transaction sees."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction

    def _read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self._transaction.get(key) for key in keys]

    def known(self, events: Sequence[Event]) -> list[bool]:
        """Whether the log has an event of the same user and id as each of these."""
        return [self._transaction.get(_id_key(e)) is not None for e in events]

    def events(self, user: User, last: int | None = None) -> list[Event]:
        """Events of a user in their order."""
        if last is None:
            return [unpack_event(user, data) for data in self._forward(user)]
        return self.before_last(user, 0, last)

    def earliest(self, user: User, count: int) -> list[Event]:
        """The first events of a user."""
        return [unpack_event(user, data) for data in islice(self._forward(user), count)]

    def before_last(self, user: User, last: int, count: int) -> list[Event]:
        """The events of a user that come before the last so many."""
        prefix = _prefix(user) + EVENT
        cursor = self._transaction.cursor()
        # To the last key before all that could come after this user's.
        found = cursor.prev() if cursor.set_range(prefix + _AFTER) else cursor.last()
        keys = cursor.iterprev(values=False) if found else iter(())
        some = takewhile(lambda key: key.startswith(prefix), islice(keys, last, last + count))
        values = [self._transaction.get(key) for key in some]
        return [unpack_event(user, data) for data in values if data is not None][::-1]

    def add(self, events: Sequence[Event]) -> None:
        """Add events."""
        for event in events:
            time = _TIME.pack(event.time + _OFFSET)
            self._transaction.put(_id_key(event), time)
            self._transaction.put(_event_key(event, time), pack_event(event))

    def remove(self, events: Sequence[Event]) -> None:
        """Remove events."""
        for event in events:
            time = _TIME.pack(event.time + _OFFSET)
            self._transaction.delete(_id_key(event))
            self._transaction.delete(_event_key(event, time))

    def forget(self, user: User) -> None:
        """Remove all that the log has of a user."""
        prefix = _prefix(user)
        cursor = self._transaction.cursor()
        found = cursor.set_range(prefix)
        while found and cursor.key().startswith(prefix):
            found = cursor.delete()  # and on to the next
        self._transaction.delete(head_key(user))

    def _put(self, key: bytes, value: bytes | None) -> None:
        if value is None:
            self._transaction.delete(key)
        else:
            self._transaction.put(key, value)

    def _forward(self, user: User) -> Iterator[bytes]:
        prefix = _prefix(user) + EVENT
        cursor = self._transaction.cursor()
        found = cursor.set_range(prefix)
        while found and cursor.key().startswith(prefix):
            yield cursor.value()
            found = cursor.next()


def _id_key(event: Event) -> bytes:
    return _prefix(event.user) + ID + event.digest


def _event_key(event: Event, time: bytes) -> bytes:
    return _prefix(event.user) + EVENT + time + event.digest
