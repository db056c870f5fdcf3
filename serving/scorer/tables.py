"""Users' tables as a request reads them: within a budget of time, or an empty history instead."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from hashtab.serving.scorer import metrics
from hashtab.serving.scorer.champion import Served
from hashtab.serving.store import (
    CorruptRecordError,
    ForeignRecordError,
    StoreError,
    TableStore,
    User,
    UserRecord,
    open_store,
    unpack,
)
from hashtab.serving.store.keys import user_key

Degraded = Literal[
    "store_slow", "store_away", "unknown_user", "no_table", "corrupt_table", "foreign_table"
]

PATIENCE_S = 1.0  # of what no request waits for
_FAILURES = 3  # in a row, after which requests do not ask the store until it answers again
_WATCH_S, _RETRY_S = 1.0, 0.1  # between two looks at a store that answers, or does not
_LOOK_FOR_TABLES_S = 5.0
_NOT_OPENED = "not opened yet"

_LOG = logging.getLogger(__name__)
_SERVERS = ("redis://", "rediss://", "unix://")
_OUTCOMES = {
    name: metrics.TABLES.labels(name)
    for name in ("hit", "miss", "corrupt", "foreign", "failed", "skipped")
}


@dataclass(frozen=True, slots=True)
class History:
    """A user's record, or an empty one and why.

    Args:
        record: read from the store, or empty.
        source: which of the two.
        degraded: why it is empty; None where it was read, or where the model reads none.
    """

    record: UserRecord
    source: Literal["table", "empty"]
    degraded: Degraded | None


class Tables:
    """The store of tables as the requests of one process use it.

    A store that fails is not asked again by requests; a watch, off their path, opens it anew until
    it answers. An LMDB folder that was replaced is noticed the same way.

    Args:
        url: of the store; None for none.
        deadline_s: seconds that a request waits for a server's answer.
    """

    def __init__(self, url: str | None, deadline_s: float) -> None:
        self._url = url
        self._deadline_s = deadline_s
        self._store: TableStore | None = None
        self._failures = 0
        self._said: set[str] = set()
        self._beat_s: float | None = None
        self._reason: Degraded = "store_away" if url else "no_table"
        self._known: set[bytes] = set()  # fingerprints of which some user has a table
        self._looked_s = -_LOOK_FOR_TABLES_S
        self._worker = ThreadPoolExecutor(1, "tables")
        metrics.STORE_UP.set(0 if url else math.nan)
        metrics.STALENESS.set(math.nan)
        self.problem: str | None = _NOT_OPENED if url else "no store was named"

    def history(self, served: Served, user: User | None) -> History:
        """Read a user's record; an empty one where it cannot be had in time."""
        if not served.reads_history:
            return History(served.empty, "empty", None)
        if user is None or not _can_be_key(served.layout.fingerprint, user):
            return self._empty(served, "unknown_user")
        if self._store is None or self._failures >= _FAILURES:
            _OUTCOMES["skipped"].inc()
            return self._empty(served, self._reason)
        data = self._read(self._store, served.layout.fingerprint, user)
        if isinstance(data, str):
            return self._empty(served, data)
        try:
            record = unpack(data, served.layout)
        except CorruptRecordError as error:
            return self._unusable(served, "corrupt", error)
        except ForeignRecordError as error:
            return self._unusable(served, "foreign", error)
        _OUTCOMES["hit"].inc()
        return History(record, "table", None)

    def _read(self, store: TableStore, fingerprint: bytes, user: User) -> bytes | Degraded:
        begun = time.perf_counter()
        try:
            data = store.get(fingerprint, [user])[0]
        except StoreError as error:
            self._fail(error, time.perf_counter() - begun)
            return self._reason
        metrics.READ_SECONDS.observe(time.perf_counter() - begun)
        if self.problem is not None:
            self._recover(store)
        if data is not None:
            return data
        _OUTCOMES["miss"].inc()
        return "unknown_user" if fingerprint in self._known else "no_table"

    def _fail(self, error: StoreError, after_s: float) -> None:
        _OUTCOMES["failed"].inc()
        # Whatever the store is, silence until the deadline is what tells slow from away.
        self._reason = "store_slow" if after_s >= self._deadline_s else "store_away"
        self._failures += 1
        if self._failures >= _FAILURES:
            metrics.STORE_UP.set(0)
        self._say(str(error))

    def _unusable(
        self, served: Served, kind: Literal["corrupt", "foreign"], error: StoreError
    ) -> History:
        _OUTCOMES[kind].inc()
        if str(error) not in self._said:  # once, and not of whom: metrics count them
            self._said.add(str(error))
            _LOG.warning(
                "a user's table: %s; scored with an empty history; `python -m "
                "hashtab.serving.store verify` names all such users",
                error,
            )
        return self._empty(served, "corrupt_table" if kind == "corrupt" else "foreign_table")

    def _empty(self, served: Served, reason: Degraded) -> History:
        metrics.DEGRADED.labels(reason).inc()
        return History(served.empty, "empty", reason)

    @property
    def named(self) -> bool:
        """Whether there is a store."""
        return self._url is not None

    async def watch(self, served: Callable[[], Served | None]) -> None:
        """Look after the store until cancelled.

        Args:
            served: gives the generation whose tables are read.
        """
        while self._url is not None:
            await self.look(served())
            await asyncio.sleep(_RETRY_S if self.problem else _WATCH_S)

    async def look(self, served: Served | None) -> None:
        """Open the store anew, so that requests use it if it answers."""
        try:
            await self._look(served)
        finally:
            age_s = math.nan if self._beat_s is None else max(0.0, time.time() - self._beat_s)
            metrics.STALENESS.set(age_s)

    async def _look(self, served: Served | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            opened = await loop.run_in_executor(self._worker, self._open)
        except StoreError as error:
            self._say(str(error))
            metrics.STORE_UP.set(0)
            return
        before, self._store = self._store, opened  # between two requests
        self._recover(opened)
        await loop.run_in_executor(self._worker, self._finish, before, served)

    def _recover(self, store: TableStore) -> None:
        self._failures = 0
        metrics.STORE_UP.set(1)
        if self.problem is not None:
            _LOG.info("the store answers: %s", store.name)
        self.problem = None

    def _open(self) -> TableStore:
        assert self._url is not None
        return open_store(_within(self._url, self._deadline_s), readonly=True)

    def _finish(self, before: TableStore | None, served: Served | None) -> None:
        if before is not None:
            before.close()
        with suppress(StoreError), self.patient() as store:
            beat = store.heartbeat()
            self._beat_s = None if beat is None else beat / 1e6
            # Seldom: a server without any is searched to its end.
            if served is not None and time.monotonic() > self._looked_s + _LOOK_FOR_TABLES_S:
                self._looked_s = time.monotonic()
                self._look_for_tables(store, served.layout.fingerprint)

    def look_for_tables(self, fingerprint: bytes) -> None:
        """Look whether any user has a table of a model that is about to be served."""
        with suppress(StoreError), self.patient() as store:
            self._look_for_tables(store, fingerprint)

    def _look_for_tables(self, store: TableStore, fingerprint: bytes) -> None:
        if fingerprint not in self._known and next(store.users(fingerprint), None) is not None:
            self._known.add(fingerprint)

    def patient(self) -> TableStore:
        """Open the store for work that no request waits for.

        Raises:
            StoreError: if it cannot be opened.
        """
        if self._url is None:
            raise StoreError("no store was named")
        return open_store(_within(self._url, PATIENCE_S), readonly=True)

    def _say(self, problem: str) -> None:
        if self.problem in (None, _NOT_OPENED):
            _LOG.warning("%s; scored with empty histories", problem)
        self.problem = problem

    def close(self) -> None:
        """Let go of the store."""
        self._worker.shutdown()
        if self._store is not None:
            self._store.close()
            self._store = None


def _within(url: str, seconds: float) -> str:
    """The URL of a store whose server is given so long for each answer."""
    if not url.startswith(_SERVERS):
        return url
    joint = "&" if "?" in url else "?"
    return f"{url}{joint}socket_timeout={seconds:g}&socket_connect_timeout={seconds:g}"


def _can_be_key(fingerprint: bytes, user: User) -> bool:
    try:
        user_key(fingerprint, user)
    except StoreError:
        return False
    return True
