"""User tables in a server that speaks the Redis protocol, for scorers on several machines."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from hashtab.serving.store.errors import StoreError
from hashtab.serving.store.keys import User
from hashtab.serving.store.log import Change, LogReader, head_key, value_key
from hashtab.serving.store.plan import PLAN
from hashtab.serving.store.redis_log import PREFIX, RedisChange
from hashtab.serving.store.store import PAGE, TableStore

try:
    import redis
except ImportError as error:
    raise StoreError(
        "a redis:// store needs the redis client; install it with pip install 'hashtab[redis]'"
    ) from error

Result = TypeVar("Result")

CONNECT_S, ANSWER_S = 5, 30  # a put of many records waits for the server's disk


class RedisStore(TableStore):
    """A store in a Redis-protocol server.

    One command or transaction writes all of a put, so none of it is seen before the rest. Whether
    it outlives the server is the server's setting: `appendonly yes` with `appendfsync always` loses
    nothing. A server that evicts keys makes users unknown, or their tables lack the latest events
    until the BSE service writes the user again.
    """

    def __init__(self, url: str, *, readonly: bool = False) -> None:
        super().__init__(readonly=readonly)
        try:
            self._client: Any = redis.Redis.from_url(
                url, socket_connect_timeout=CONNECT_S, socket_timeout=ANSWER_S
            )
        except ValueError:
            # Neither the URL nor its error is shown: both may hold the password.
            scheme = url.partition("://")[0]
            raise StoreError(
                f"the {scheme}:// URL of a store cannot be read; write redis://host:port/database "
                "or unix:///path?db=0, with special characters of a password percent-encoded"
            ) from None
        self.name = _name(self._client.connection_pool.connection_kwargs)
        try:
            self._claim()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections to the server."""
        self._client.close()

    def losses(self) -> list[str]:
        """Ways in which what was written may be lost by the settings of the server, in words."""
        with _explained(self.name):
            info = self._client.info()
        found = []
        if not info.get("aof_enabled"):
            found.append("it keeps no log on disk: start it with --appendonly yes")
        elif self._setting("appendfsync") not in ("always", None):
            found.append("it syncs its log later than it answers: set appendfsync to always")
        if info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction":
            found.append("it evicts keys when memory is full: set maxmemory-policy to noeviction")
        return found

    def _setting(self, name: str) -> str | None:
        """A setting of the server, None where it does not tell."""
        try:
            value = self._client.config_get(name).get(name)
        except redis.ResponseError:  # hosted servers forbid the question
            return None
        return value.decode() if isinstance(value, bytes) else value

    def _read(self, keys: list[bytes]) -> list[bytes | None]:
        found: list[bytes | None] = []
        with _explained(self.name):
            for start in range(0, len(keys), PAGE):
                found += self._client.mget([PREFIX + key for key in keys[start : start + PAGE]])
        return found

    def _write(self, values: Mapping[bytes, bytes | None]) -> None:
        kept = {PREFIX + key: value for key, value in values.items() if value is not None}
        gone = [PREFIX + key for key, value in values.items() if value is None]
        with _explained(self.name):
            if not gone:  # without a transaction, whose errors repeat the whole command
                self._client.mset(kept)
                return
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.unlink(*gone)
                if kept:
                    pipeline.mset(kept)
                pipeline.execute()

    @contextmanager
    def reading(self) -> Iterator[LogReader]:
        """Read the log and records as they are."""
        with _explained(self.name):
            yield RedisChange(self._client)

    def _change(
        self, users: Sequence[User], work: Callable[[Change], Result], values: Sequence[str]
    ) -> Result:
        keys = [*map(value_key, (PLAN, *values)), *map(head_key, users)]
        watched = [PREFIX + key for key in keys]
        with _explained(self.name), self._client.pipeline(transaction=True) as pipeline:
            while True:
                pipeline.watch(*watched)
                change = RedisChange(self._client)
                result = work(change)
                pipeline.multi()
                change.send(pipeline)
                try:
                    pipeline.execute()
                except redis.WatchError:  # another writer changed one of these users meanwhile
                    continue
                return result

    def _delete(self, keys: list[bytes]) -> list[bool]:
        with _explained(self.name), self._client.pipeline(transaction=True) as pipeline:
            for key in keys:
                pipeline.unlink(PREFIX + key)
            return [bool(there) for there in pipeline.execute()]

    def _pages(self, prefix: bytes) -> Iterator[list[bytes]]:
        pattern = _literal(PREFIX + prefix) + b"*"
        cursor = 0
        while True:
            with _explained(self.name):
                cursor, keys = self._client.scan(cursor, match=pattern, count=PAGE)
            yield [key[len(PREFIX) :] for key in keys]
            if cursor == 0:
                return


def _literal(text: bytes) -> bytes:
    """Escape what a SCAN pattern gives a meaning; a fingerprint may hold any byte."""
    special = b"*?[]^-\\"
    return b"".join(b"\\" + bytes([c]) if c in special else bytes([c]) for c in text)


def _name(where: Mapping[str, Any]) -> str:
    database = where.get("db", 0)
    if "path" in where:
        return f"redis at {where['path']}, database {database}"
    host, port = where.get("host", "localhost"), where.get("port", 6379)
    return f"redis at {host}:{port}, database {database}"


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn errors of the client and the server into one sentence that says what to do."""
    try:
        yield
    except redis.RedisError as error:
        raise StoreError(f"{name} {_advice(error)}") from error


def _advice(error: redis.RedisError) -> str:
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return "has no memory left: raise its maxmemory, or drop fingerprints of old models"
    if isinstance(error, redis.exceptions.ReadOnlyError):
        return "is a read-only replica: name its primary, or open it readonly"
    if isinstance(error, redis.BusyLoadingError):
        return "is still loading its data: try again when it has"
    refused = redis.AuthenticationError, redis.exceptions.NoPermissionError
    if isinstance(error, refused) or "NOAUTH" in str(error):
        return "refuses this user or password: write redis://user:password@host:port/database"
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return f"does not answer: check the address and that the server runs ({error})"
    return f"refuses: {error}"
