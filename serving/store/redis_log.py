"""The event log in a Redis-protocol server: of each user a sorted set of times and a hash."""

from collections.abc import Sequence
from typing import Any

from hashtab.serving.store.errors import StoreError
from hashtab.serving.store.events import Event, pack_event, unpack_event
from hashtab.serving.store.keys import User, user_key
from hashtab.serving.store.log import (
    EVENT,
    ID,
    LOG,
    Change,
    head_key,
)

PREFIX = b"hashtab:"
"""Before every key, since a server may hold other programs' keys too."""

_LATEST = 1 << 53  # a sorted set keeps its times as doubles, exact up to here: the year 2255


class RedisChange(Change):
    """A change whose writes are kept until all is read, then sent as one transaction.

    Args:
        client: for reads.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._writes: list[tuple[Any, ...]] = []

    def send(self, pipeline: Any) -> None:
        """Give all writes to a pipeline."""
        for command in self._writes:
            pipeline.execute_command(*command)

    def _read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if not keys:
            return []
        found: list[bytes | None] = self._client.mget([PREFIX + key for key in keys])
        return found

    def known(self, events: Sequence[Event]) -> list[bool]:
        """Whether the log has an event of the same user and id as each of these."""
        pipeline = self._client.pipeline(transaction=False)
        for event in events:
            pipeline.hexists(_events_key(event.user), event.digest)
        return [bool(found) for found in pipeline.execute()]

    def events(self, user: User, last: int | None = None) -> list[Event]:
        """Events of a user in their order."""
        return self._range(user, 0 if last is None else -last, -1) if last != 0 else []

    def earliest(self, user: User, count: int) -> list[Event]:
        """The first events of a user."""
        return self._range(user, 0, count - 1) if count else []

    def before_last(self, user: User, last: int, count: int) -> list[Event]:
        """The events of a user that come before the last so many."""
        return self._range(user, -last - count, -last - 1) if count else []

    def _range(self, user: User, first: int, to: int) -> list[Event]:
        digests = self._client.zrange(_times_key(user), first, to)
        if not digests:
            return []
        found = self._client.hmget(_events_key(user), digests)
        return [unpack_event(user, data) for data in found if data is not None]

    def add(self, events: Sequence[Event]) -> None:
        """Add events."""
        for event in events:
            if not -_LATEST <= event.time <= _LATEST:
                raise StoreError(f"time {event.time} of event {event.id!r} is out of range")
            self._write("ZADD", _times_key(event.user), event.time, event.digest)
            self._write("HSET", _events_key(event.user), event.digest, pack_event(event))

    def remove(self, events: Sequence[Event]) -> None:
        """Remove events."""
        for event in events:
            self._write("ZREM", _times_key(event.user), event.digest)
            self._write("HDEL", _events_key(event.user), event.digest)

    def forget(self, user: User) -> None:
        """Remove all that the log has of a user."""
        self._write("UNLINK", _times_key(user), _events_key(user), PREFIX + head_key(user))

    def _put(self, key: bytes, value: bytes | None) -> None:
        if value is None:
            self._write("UNLINK", PREFIX + key)
        else:
            self._write("SET", PREFIX + key, value)

    def _write(self, *command: Any) -> None:
        self._writes.append(command)


def _times_key(user: User) -> bytes:
    return PREFIX + LOG + EVENT + user_key(LOG, user)[len(LOG) :]


def _events_key(user: User) -> bytes:
    return PREFIX + LOG + ID + user_key(LOG, user)[len(LOG) :]
