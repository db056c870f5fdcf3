"""The event log of a store: what is read of it, and how it changes together with the tables.

The log is the truth. Tables are sums over it, and whoever changes one changes the other in the
same transaction; so do the offsets of the sources that events come from.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from hashtab.serving.store.errors import CorruptRecordError
from hashtab.serving.store.events import Event
from hashtab.serving.store.keys import User, delta_key, user_key

LOG = b"hashtab:"
"""In place of a fingerprint in the keys of the log; eight bytes as that is."""
VALUE, USER = b"v", b"u"  # tags after it; that of a user's head is that of their record
EVENT, ID = b"e", b"x"


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the log says of one user.

    Args:
        events: in the log.
        watermark: microseconds; events strictly before it have left the log, and such ones that
            arrive now are late.
        earliest: microseconds, time of the earliest event in the log.
        revision: changes of this user.
    """

    events: int = 0
    watermark: int = -(1 << 63)
    earliest: int = 0
    revision: int = 0


def head_key(user: User) -> bytes:
    """Return the key of a user's head; the user can be read from it."""
    return user_key(LOG, user)


def value_key(name: str) -> bytes:
    """Return the key of a value of the whole log."""
    return LOG + VALUE + name.encode()


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[int, int, int, int]).decode


def pack_head(head: Head) -> bytes:
    """Return the bytes of a head."""
    return _encode((head.events, head.watermark, head.earliest, head.revision))


def unpack_head(data: bytes) -> Head:
    """Read what `pack_head` wrote.

    Raises:
        CorruptRecordError: if the bytes are not those of a head.
    """
    try:
        events, watermark, earliest, revision = _decode(data)
    except msgspec.MsgspecError as error:
        raise CorruptRecordError(
            f"a user's entry in the log cannot be read ({error}); delete the user and replay"
        ) from error
    return Head(events=events, watermark=watermark, earliest=earliest, revision=revision)


def with_deltas(
    read: Callable[[list[bytes]], list[bytes | None]], keys: Sequence[bytes]
) -> list[bytes | None]:
    """Read values of records' keys, each followed by that of its delta where there is one."""
    found = read([each for key in keys for each in (key, delta_key(key))])
    pairs = zip(found[::2], found[1::2], strict=True)
    return [record + delta if record and delta else record for record, delta in pairs]


class LogReader(ABC):
    """Reads a log and the records beside it, as of one moment on LMDB."""

    def value(self, name: str) -> bytes | None:
        """A value of the whole log, such as a source's offset; None where there is none."""
        return self._read([value_key(name)])[0]

    def heads(self, users: Sequence[User]) -> list[Head | None]:
        """What the log says of users, in their order; None where it knows none of theirs."""
        found = self._read([head_key(user) for user in users])
        return [None if data is None else unpack_head(data) for data in found]

    def records(self, fingerprint: bytes, users: Sequence[User]) -> list[bytes | None]:
        """Records of users with their deltas after them, in the users' order."""
        return with_deltas(self._read, [user_key(fingerprint, user) for user in users])

    def deltas(self, fingerprint: bytes, users: Sequence[User]) -> list[bytes | None]:
        """Deltas of users alone, in their order."""
        return self._read([delta_key(user_key(fingerprint, user)) for user in users])

    @abstractmethod
    def known(self, events: Sequence[Event]) -> list[bool]:
        """Whether the log has an event of the same user and id as each of these."""

    @abstractmethod
    def events(self, user: User, last: int | None = None) -> list[Event]:
        """Events of a user in their order; the last so many, or all."""

    @abstractmethod
    def earliest(self, user: User, count: int) -> list[Event]:
        """The first events of a user in their order, at most so many."""

    @abstractmethod
    def before_last(self, user: User, last: int, count: int) -> list[Event]:
        """The events of a user that come before the last so many, at most `count`, in order."""

    @abstractmethod
    def _read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values of keys, None where there is none."""


class Change(LogReader):
    """One change of log and tables: all of it is written, or nothing.

    On LMDB reads see what the change has written itself. On Redis they do not: read first.
    """

    @abstractmethod
    def add(self, events: Sequence[Event]) -> None:
        """Add events that the log does not know."""

    @abstractmethod
    def remove(self, events: Sequence[Event]) -> None:
        """Remove events that the log knows."""

    def put_head(self, user: User, head: Head | None) -> None:
        """Write what the log says of a user; None when it is to know nothing more."""
        self._put(head_key(user), None if head is None else pack_head(head))

    def put_records(
        self,
        fingerprint: bytes,
        records: Mapping[User, bytes | None],
        deltas: Mapping[User, bytes | None] | None = None,
    ) -> None:
        """Write records, and their first deltas in place of those that there were.

        None deletes; a record without a delta is written anew at its next change.
        """
        deltas = deltas or {}
        for user, record in records.items():
            key = user_key(fingerprint, user)
            self._put(key, record)
            self._put(delta_key(key), deltas.get(user))

    def put_deltas(self, fingerprint: bytes, deltas: Mapping[User, bytes]) -> None:
        """Write deltas of records that stay as they are."""
        for user, delta in deltas.items():
            self._put(delta_key(user_key(fingerprint, user)), delta)

    def put_value(self, name: str, value: bytes | None) -> None:
        """Write a value of the whole log; None deletes."""
        self._put(value_key(name), value)

    @abstractmethod
    def forget(self, user: User) -> None:
        """Remove all that the log has of a user, whether it can be read or not."""

    @abstractmethod
    def _put(self, key: bytes, value: bytes | None) -> None:
        """Write a value; None deletes."""
