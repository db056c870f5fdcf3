"""User tables in a folder beside the scorer: LMDB, read by several processes while one writes."""

import errno
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path
from typing import TypeAlias, TypeVar

import lmdb

from hashtab.serving.store.errors import StoreError
from hashtab.serving.store.keys import FINGERPRINT_BYTES, FORMAT_KEY, User
from hashtab.serving.store.lmdb_log import LmdbChange
from hashtab.serving.store.log import LOG, Change, LogReader
from hashtab.serving.store.store import PAGE, TableStore
from hashtab.serving.store.writing import LOCK

FIRST_MAP_BYTES = 1 << 26  # address space, not disk: the file grows with what is written
WAIT_S = 1e-4  # between two looks whether transactions have ended

Transaction: TypeAlias = "lmdb.Transaction[bytes]"  # quoted: generic for type checkers only
Result = TypeVar("Result")


class LmdbStore(TableStore):
    """A store in one folder. Writes are synced to the disk, one writer at a time."""

    def __init__(self, path: str, *, readonly: bool = False) -> None:
        super().__init__(readonly=readonly)
        self.name = path
        self._environment: _Environment | None = None
        with _explained(path):
            self._environment = _share(Path(path), readonly)
            try:
                self._claim()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Let go of the environment; the last store of this process closes it."""
        if self._environment is not None:
            _release(self._environment)
        self._environment = None

    def _claim(self) -> None:
        with self._opened().reading() as transaction:
            taken = transaction.stat()["entries"] > 0 and transaction.get(FORMAT_KEY) is None
        if taken:
            raise StoreError(f"{self.name} is another program's LMDB folder; name another one")
        super()._claim()

    def _read(self, keys: list[bytes]) -> list[bytes | None]:
        with _explained(self.name), self._opened().reading() as transaction:
            return [transaction.get(key) for key in keys]

    def _write(self, values: Mapping[bytes, bytes | None]) -> None:
        def write(transaction: Transaction) -> None:
            for key in sorted(values):  # neighbours share pages
                value = values[key]
                if value is None:
                    transaction.delete(key)
                else:
                    transaction.put(key, value)

        with _explained(self.name):
            self._opened().change(write)

    @contextmanager
    def reading(self) -> Iterator[LogReader]:
        """Read the log and records as of one moment."""
        with _explained(self.name), self._opened().reading() as transaction:
            yield LmdbChange(transaction)

    def fingerprints(self) -> list[bytes]:
        """Fingerprints that have a record or a note; one look at the keys for each."""
        found: list[bytes] = []
        with _explained(self.name), self._opened().reading() as transaction:
            cursor = transaction.cursor()
            there = cursor.first()
            while there:
                key = cursor.key()
                start = key[:FINGERPRINT_BYTES]
                if len(key) > FINGERPRINT_BYTES and start != LOG:
                    found.append(start)
                there = cursor.set_range(start + b"\xff") if start != key else cursor.next()
        return found

    def _change(
        self,
        users: Sequence[User],  # noqa: ARG002  one writer at a time has them all
        work: Callable[[Change], Result],
        values: Sequence[str],  # noqa: ARG002
    ) -> Result:
        with _explained(self.name):
            return self._opened().change(lambda transaction: work(LmdbChange(transaction)))

    def _delete(self, keys: list[bytes]) -> list[bool]:
        def delete(transaction: Transaction) -> list[bool]:
            return [transaction.delete(key) for key in keys]

        with _explained(self.name):
            return self._opened().change(delete)

    def _pages(self, prefix: bytes) -> Iterator[list[bytes]]:
        # A transaction a page: one that stays open keeps the file from using freed pages again.
        page = self._page(prefix, None)
        while page:
            yield page
            page = self._page(prefix, page[-1])

    def _page(self, prefix: bytes, last: bytes | None) -> list[bytes]:
        """The next keys with the prefix after the last one."""
        with _explained(self.name), self._opened().reading() as transaction:
            cursor = transaction.cursor()
            if not cursor.set_range(prefix if last is None else last):
                return []
            keys = islice(cursor.iternext(values=False), PAGE)
            return [k for k in takewhile(lambda k: k.startswith(prefix), keys) if k != last]

    def _opened(self) -> "_Environment":
        if self._environment is None:
            raise StoreError(f"{self.name} is closed; open it again")
        return self._environment


class _Environment:
    """An LMDB environment, of which a process may hold one a folder; safe between threads.

    Its map may only be resized, and it may only be closed, while none of its transactions is open.
    """

    def __init__(self, path: Path, readonly: bool) -> None:
        self.stores = 0
        self.identity = (0, 0)
        self._path = path
        self._inside: set[object] = set()  # a token an open transaction; changes are atomic
        self._exclusive = False
        self._exclusion = threading.Lock()
        self._writing = threading.Lock()
        self._open(readonly)

    def _open(self, readonly: bool) -> None:
        self.readonly = readonly
        self._lmdb = _open_at_its_size(self._path, readonly)
        if not readonly:
            self._lmdb.reader_check()  # killed readers would keep pages from being used again

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """A read transaction; those of one thread must not overlap."""
        token = object()
        try:
            with self._begin(token, write=False) as transaction:
                yield transaction
        finally:
            self._inside.discard(token)

    def change(self, work: Callable[[Transaction], Result]) -> Result:
        """Run `work` in a write transaction, and again in a larger map where this one is full."""
        with self._writing:
            while True:
                try:
                    return self._attempt(work)
                except lmdb.MapFullError:
                    self._grow()

    def _attempt(self, work: Callable[[Transaction], Result]) -> Result:
        token = object()
        try:
            transaction = self._begin(token, write=True)
            try:
                result = work(transaction)
                transaction.commit()
            except BaseException:
                self._inside.discard(token)
                # lmdb 3 aborts once no read is under way, which without this might be never.
                with self._alone():
                    transaction.abort()
                raise
        finally:
            self._inside.discard(token)
        return result

    def _begin(self, token: object, write: bool) -> Transaction:
        """A transaction over the map as it is now, whichever process enlarged it."""
        while True:
            self._enter(token)
            try:
                return self._lmdb.begin(write=write)
            except lmdb.MapResizedError:
                self._inside.discard(token)
                with self._alone():
                    self._lmdb.set_mapsize(0)  # the size that the file has by now

    def _grow(self) -> None:
        with self._alone():
            full = self._lmdb.info()["map_size"]
            self._lmdb.set_mapsize(0)  # another process may have enlarged it
            if self._lmdb.info()["map_size"] <= full:
                self._lmdb.set_mapsize(2 * full)

    def _enter(self, token: object) -> None:
        # First announced, then looked, without a lock: readers by the thousand a second would
        # keep a writer from ever getting it.
        self._inside.add(token)
        while self._exclusive:
            self._inside.discard(token)
            with self._exclusion:
                self._inside.add(token)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no transaction begin, wait for those that are open."""
        with self._exclusion:
            self._exclusive = True
            try:
                while self._inside:
                    time.sleep(WAIT_S)
                yield
            finally:
                self._exclusive = False

    def make_writable(self) -> None:
        if self.readonly:
            with self._alone():
                self._lmdb.close()
                try:
                    self._open(readonly=False)
                except BaseException:
                    self._open(readonly=True)  # as those who only read still need it
                    raise

    def close(self) -> None:
        with self._alone():
            self._lmdb.close()


def _open_at_its_size(path: Path, readonly: bool) -> "lmdb.Environment":
    while True:
        try:
            return lmdb.open(str(path), map_size=FIRST_MAP_BYTES, readonly=readonly)
        except lmdb.MapResizedError:
            # Another process enlarged the map after its size was read: it is read again.
            continue


_environments: dict[tuple[int, int], _Environment] = {}  # by the identity of their data files
_registry = threading.Lock()


def _share(folder: Path, readonly: bool) -> _Environment:
    """The environment of a folder: LMDB forbids a process to open the same one twice."""
    with _registry:
        data = _data_file(folder, readonly)
        environment = _environments.get(_identity(data)) if data.exists() else None
        if environment is None:
            environment = _Environment(folder, readonly)
            environment.identity = _identity(data)
            _environments[environment.identity] = environment
        elif not readonly:
            environment.make_writable()
        environment.stores += 1
        return environment


def _release(environment: _Environment) -> None:
    with _registry:
        environment.stores -= 1
        if environment.stores == 0:
            del _environments[environment.identity]
            environment.close()


def _identity(data: Path) -> tuple[int, int]:
    found = data.stat()
    return found.st_dev, found.st_ino


def _data_file(folder: Path, readonly: bool) -> Path:
    """Where the data of a folder's store lie or may come to lie."""
    data = folder / "data.mdb"
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file and no store; name a folder")
    if data.exists():
        return data
    if readonly:
        raise StoreError(f"{folder} holds no store; check the path, or encode users into it first")
    folder.mkdir(parents=True, exist_ok=True)
    # A lock file alone is a store that another process is making right now.
    if any(path.name not in ("data.mdb", "lock.mdb", LOCK) for path in folder.iterdir()):
        raise StoreError(f"{folder} holds other files and no store; name a new or empty folder")
    return data


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn errors of LMDB and of the file system into one sentence that says what to do."""
    try:
        yield
    except (lmdb.Error, OSError) as error:
        raise StoreError(f"{path} {_advice(error)}") from error


def _advice(error: Exception) -> str:
    # EIO is what LMDB says of a write that the disk cut short.
    number = getattr(error, "code", None) or getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return (
            "cannot be written, its disk is full or broken: free some space and run again; "
            "what was written before is kept"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            "may not be written by this user: change its permissions, or open it readonly; "
            "readers too must be able to write its lock.mdb, but on a read-only disk"
        )
    # lmdb 3 says the latter, with no class or code of its own.
    if isinstance(error, lmdb.VersionMismatchError) or "data format" in str(error):
        return "was written by another version of LMDB; install the lmdb that wrote it"
    if isinstance(error, lmdb.ReadersFullError):
        return "is read by as many threads and processes as it can be; close some of them"
    damaged = lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError
    if isinstance(error, damaged):
        return f"is no store or a damaged one; remove it and encode its users again ({error})"
    return f"cannot be used: {error}"
