"""What every store of user tables does: bytes in and out by fingerprint and user.

Keys, pages and refusals are decided here; a backend reads, writes, lists and deletes plain keys.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Self, TypeVar

from hashtab.serving.store.errors import StoreError
from hashtab.serving.store.events import Event
from hashtab.serving.store.keys import (
    DELTA_TAGS,
    FINGERPRINT_BYTES,
    FORMAT_KEY,
    INT_TAG,
    NOTE_TAG,
    STR_TAG,
    User,
    check_fingerprint,
    delta_key,
    is_user_key,
    note_key,
    user_key,
    user_of,
)
from hashtab.serving.store.log import LOG, Change, LogReader, with_deltas
from hashtab.serving.store.plan import HEARTBEAT, PLAN, KeptModel, Plan

STORE_FORMAT = b"2"
PAGE = 512
"""Keys that one step of a long walk or of a drop takes: with 64 kB records, 32 MB.

Even, so that a record is read together with its delta.
"""

Result = TypeVar("Result")
AnyUser = TypeVar("AnyUser", bound=User)  # keys of a mapping are invariant


class TableStore(ABC):
    """User records of one or more models; a context manager that closes itself.

    One store may be used by several threads and, opened once in each, by several processes; it
    does not survive a fork.

    Attributes:
        name: the store in words, without a password.
    """

    name: str

    def __init__(self, *, readonly: bool) -> None:
        self._readonly = readonly

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, fingerprint: bytes, users: Sequence[User]) -> list[bytes | None]:
        """Records of users with their deltas after them, in the users' order; None for none.

        Raises:
            StoreError: if the store cannot be read or a user cannot be a key.
        """
        return with_deltas(self._read, [user_key(fingerprint, user) for user in users])

    def put(
        self,
        fingerprint: bytes,
        records: Mapping[AnyUser, bytes | None],
        notes: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write records, and notes beside them: all of them or, on an error or a kill, none.

        None in place of a record deletes the one that is there.

        A note is a small value about the records, such as which part of a data set they hold. When
        this returns, what was written survives a kill; on LMDB also a power cut, on Redis what the
        server's `appendfsync` promises.

        Raises:
            StoreError: if the store cannot be written or a user or name cannot be a key.
        """
        keyed = {user_key(fingerprint, user): record for user, record in records.items()}
        values = keyed | dict.fromkeys(map(delta_key, keyed))
        values |= {note_key(fingerprint, name): note for name, note in (notes or {}).items()}
        self._check_writable()
        if values:
            self._write(values)

    def losses(self) -> list[str]:
        """Ways in which what was written may be lost by the settings of a server, in words."""
        return []

    def note(self, fingerprint: bytes, name: str) -> bytes | None:
        """A note of a fingerprint, None where there is none."""
        return self._read([note_key(fingerprint, name)])[0]

    def users(self, fingerprint: bytes) -> Iterator[User]:
        """Users with a record of a fingerprint, a page at a time.

        LMDB gives them in the order of keys. Users written meanwhile may be missed, and a Redis
        server that shrinks meanwhile may give one twice.
        """
        for page in self._user_pages(fingerprint):
            yield from map(user_of, page)

    def items(self, fingerprint: bytes) -> Iterator[tuple[User, bytes]]:
        """Users of a fingerprint with their records, as `users` gives them."""
        for page in self._user_pages(fingerprint):
            for key, record in zip(page, with_deltas(self._read, page), strict=True):
                if record is not None:  # dropped since its key was read
                    yield user_of(key), record

    def counts(self) -> dict[bytes, int]:
        """Number of users by fingerprint; walks over all keys."""
        keys = filter(is_user_key, chain.from_iterable(self._pages(b"")))
        return dict(Counter(key[:FINGERPRINT_BYTES] for key in keys if not key.startswith(LOG)))

    def fingerprints(self) -> list[bytes]:
        """Fingerprints that have a record or a note; walks over all keys."""
        keys = chain.from_iterable(self._pages(b""))
        found = {key[:FINGERPRINT_BYTES] for key in keys if len(key) > FINGERPRINT_BYTES}
        return sorted(found - {LOG})

    def remove(self, fingerprint: bytes, users: Iterable[User]) -> int:
        """Delete records of users, and with them all notes of the fingerprint.

        A note may say that these records are complete, which no longer holds.

        Returns:
            How many records were there.
        """
        self._check_writable()
        self._delete(self._note_keys(fingerprint))
        return self._delete_records([user_key(fingerprint, user) for user in users])

    def drop(self, fingerprint: bytes) -> int:
        """Delete all of a fingerprint, a page at a time; after a kill, drop again for the rest.

        Returns:
            How many records were there.
        """
        self._check_writable()
        # First, since a note may say that the records are complete.
        self._delete(self._note_keys(fingerprint))
        there = sum(self._delete_records(page) for page in self._user_pages(fingerprint))
        for tag in DELTA_TAGS.values():  # of records that another program has deleted
            for page in self._pages(check_fingerprint(fingerprint) + tag):
                self._delete(page)
        return there

    def events(self, user: User, last: int | None = None) -> list[Event]:
        """Events of a user in the log, in order of time; the last so many, or all.

        Raises:
            StoreError: if the log cannot be read.
        """
        with self.reading() as log:
            return log.events(user, last)

    def logged_users(self) -> Iterator[User]:
        """Users with events in the log, as `users` gives those with a record."""
        return self.users(LOG)

    def plan(self) -> Plan:
        """What the writers of the log agree on; an empty plan where there are none."""
        with self.reading() as log:
            return Plan.from_bytes(log.value(PLAN))

    def kept_models(self) -> dict[bytes, KeptModel]:
        """Models whose tables are kept up to date from the log, by fingerprint."""
        return {bytes.fromhex(name): model for name, model in self.plan().models.items()}

    def check_not_kept(self, fingerprint: bytes) -> None:
        """Refuse to replace or delete tables that are kept up to date from the log.

        Raises:
            StoreError: if these are.
        """
        if fingerprint in self.kept_models():
            raise StoreError(
                f"the BSE service keeps the tables of fingerprint {fingerprint.hex()} in "
                f"{self.name} from its event log: name another store, or give the service another "
                "model, after which it drops these itself"
            )

    def heartbeat(self) -> int | None:
        """When a writer last said that all it had accepted was in the tables, microseconds."""
        with self.reading() as log:
            value = log.value(HEARTBEAT)
        return None if value is None else int(value)

    def change(
        self,
        users: Sequence[User],
        work: Callable[[Change], Result],
        values: Sequence[str] = (),
    ) -> Result:
        """Change the log and the tables of some users in one transaction.

        Args:
            users: whose heads, events and records `work` reads and may write.
            work: reads and writes; called again where another writer was faster, so it must not
                do anything else.
            values: names of values, beside the plan, that `work` decides by.

        Returns:
            What `work` returned at last. What it wrote then is as durable as `put` makes records.

        Raises:
            StoreError: if the store cannot be read or written; nothing was changed, or, where a
                server's answer was lost, all of it.
        """
        self._check_writable()
        return self._change(users, work, values)

    def _user_pages(self, fingerprint: bytes) -> Iterator[list[bytes]]:
        # By tag: a log has many more keys of events than of users.
        for tag in (INT_TAG, STR_TAG):
            yield from self._pages(check_fingerprint(fingerprint) + tag)

    def _delete_records(self, keys: list[bytes]) -> int:
        """Delete records and their deltas at once; return how many records were there."""
        there = self._delete([*keys, *map(delta_key, keys)])
        return sum(there[: len(keys)])

    def _note_keys(self, fingerprint: bytes) -> list[bytes]:
        return list(chain.from_iterable(self._pages(check_fingerprint(fingerprint) + NOTE_TAG)))

    def _claim(self) -> None:
        """Mark a new store with the format of its keys, refuse one of another format."""
        found = self._read([FORMAT_KEY])[0]
        if found is None and self._readonly:
            raise StoreError(f"{self.name} holds no store yet; encode users into it first")
        if found is None:
            self._write({FORMAT_KEY: STORE_FORMAT})
        elif found != STORE_FORMAT:
            raise StoreError(
                f"{self.name} has store format {found.decode(errors='replace')}, this hashtab "
                f"reads {STORE_FORMAT.decode()}; install the version that wrote it"
            )

    def _check_writable(self) -> None:
        if self._readonly:
            raise StoreError(f"{self.name} is open for reading only; open it without readonly")

    @abstractmethod
    def close(self) -> None:
        """Let go of the store; closing twice is harmless."""

    @abstractmethod
    def reading(self) -> AbstractContextManager[LogReader]:
        """Read the log and records as of one moment; on Redis, as they are."""

    @abstractmethod
    def _change(
        self, users: Sequence[User], work: Callable[[Change], Result], values: Sequence[str]
    ) -> Result:
        """`change` where writing is allowed."""

    @abstractmethod
    def _read(self, keys: list[bytes]) -> list[bytes | None]:
        """Values of keys, None where there is none."""

    @abstractmethod
    def _write(self, values: Mapping[bytes, bytes | None]) -> None:
        """Write all values, and delete the keys of None; all of it or nothing, durably."""

    @abstractmethod
    def _delete(self, keys: list[bytes]) -> list[bool]:
        """Delete all of the keys at once; return which were there."""

    @abstractmethod
    def _pages(self, prefix: bytes) -> Iterator[list[bytes]]:
        """Keys that start with `prefix`, about `PAGE` at a time; keys may be deleted meanwhile."""


def open_store(url: str, *, readonly: bool = False) -> TableStore:
    """Open a store of user tables, a new one where there is none.

    Args:
        url: a folder's path or `lmdb:path` for LMDB; `redis://host:port/db`, `rediss://` or
            `unix://path` for a Redis-protocol server.
        readonly: refuse to write, and to make a new store.

    Raises:
        StoreError: if the store cannot be opened, saying what to do.
    """
    # Imported when asked for: the redis client is an optional extra.
    if url.startswith(("redis://", "rediss://", "unix://")):
        from hashtab.serving.store.redis_store import RedisStore

        return RedisStore(url, readonly=readonly)
    if "://" in url:
        raise StoreError(
            f"store {url.partition('://')[0]}:// is not known; use a path, lmdb:path, redis://, "
            "rediss:// or unix://"
        )
    from hashtab.serving.store.lmdb_store import LmdbStore

    return LmdbStore(url.removeprefix("lmdb:"), readonly=readonly)
