"""Events from a Redis stream: a consumer group, entries of dead consumers, and what is no event."""

import logging
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from hashtab.serving.bse import metrics
from hashtab.serving.bse.applying import Outcome
from hashtab.serving.bse.group_commit import GroupCommit
from hashtab.serving.bse.messages import EventIn, to_events
from hashtab.serving.bse.settings import StreamSettings
from hashtab.serving.bse.writer import Writer
from hashtab.serving.http import HttpError
from hashtab.serving.store import Event, StoreError

try:
    import redis
except ImportError as error:
    raise StoreError(
        "a stream of events needs the redis client; install it with pip install 'hashtab[redis]'"
    ) from error

_log = logging.getLogger(__name__)

_AT_ONCE = 500
_BLOCK_MS = 500
_IDLE_MS = 30_000  # after which another consumer's entries are taken over
_AGAIN_S = 1.0
_REJECTED = 100_000  # entries that were no events, of which at least so many are kept
_LOOK_S, _LAST_LOOK_S = 0.5, 2.0  # that an answer is waited for, and once more when stopping
FIELD = b"event"  # of an entry: the event as JSON, like one of POST /v1/events

_decode = msgspec.json.Decoder(EventIn).decode
Entry = tuple[bytes, Mapping[bytes, bytes] | None]


class StreamSource:
    """A thread that reads a stream and acknowledges what is durable.

    An entry that was written but not acknowledged, since someone was killed in between, comes
    again and is a duplicate by its event's id. An entry that is no event goes to the stream
    `<name>:rejected` with the reason, and holds nothing up; the last 100,000 are kept there.

    Args:
        settings: of the stream.
        commits: writes.
        writer: knows whether users must be text.
    """

    def __init__(self, settings: StreamSettings, commits: GroupCommit, writer: Writer) -> None:
        self._settings = settings
        self._commits = commits
        self._writer = writer
        self._client: Any = redis.Redis.from_url(settings.url, socket_timeout=30)
        self._consumer = uuid.uuid4().hex
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the entries under way, and end."""
        self._stopping.set()
        self._thread.join()
        with suppress(redis.RedisError):
            name, group = self._settings.name, self._settings.group
            mine = self._client.xpending_range(name, group, "-", "+", 1, self._consumer)
            if not mine:  # else another consumer takes them over first
                self._client.xgroup_delconsumer(name, group, self._consumer)
        self._client.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._make_group()
                self._take(self._read("0"))  # what was read and not written, the last time
                while not self._stopping.is_set():
                    self._take(self._orphans())
                    self._take(self._read(">"))
            except Exception as error:  # server or store away: entries wait in the stream
                metrics.FAILURES.labels("stream").inc()
                _log.warning("the stream %s is tried again: %s", self._settings.name, error)
                self._stopping.wait(_AGAIN_S)

    def _make_group(self) -> None:
        try:
            self._client.xgroup_create(
                self._settings.name, self._settings.group, id="0", mkstream=True
            )
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):  # which says that it is there
                raise

    def _read(self, after: str) -> list[Entry]:
        """Read new entries (">"), or from the first ("0") that this consumer was given before."""
        found = self._client.xreadgroup(
            self._settings.group,
            self._consumer,
            {self._settings.name: after},
            count=_AT_ONCE,
            block=_BLOCK_MS,
        )
        # A list of pairs, or with the newer protocol a mapping.
        streams = found.items() if isinstance(found, dict) else found or []
        return [entry for _, entries in streams for entry in _flat(entries)]

    def _orphans(self) -> list[Entry]:
        """Take over entries that a consumer got and has not acknowledged for long."""
        _, entries, *_ = self._client.xautoclaim(
            self._settings.name,
            self._settings.group,
            self._consumer,
            min_idle_time=_IDLE_MS,
            start_id="0-0",
            count=_AT_ONCE,
        )
        return list(entries)

    def _take(self, entries: list[Entry]) -> None:
        if not entries:
            return
        events = [event for entry in entries if (event := self._event(entry)) is not None]
        if events:
            # Its own offsets are the group's; the event ids make a second reading harmless.
            for outcome, count in _counts(self._written(events)).items():
                metrics.EVENTS.labels("stream", outcome.value).inc(count)
        self._client.xack(
            self._settings.name, self._settings.group, *(entry_id for entry_id, _ in entries)
        )

    def _written(self, events: list[Event]) -> list[Outcome]:
        answer = self._commits.submit(events)
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                return answer.result(_LOOK_S)
        return answer.result(_LAST_LOOK_S)

    def _event(self, entry: Entry) -> Event | None:
        entry_id, fields = entry
        if fields is None:  # deleted from the stream since it was read
            return None
        try:
            (event,) = to_events([_decode(fields[FIELD])], self._writer.text_users)
        except KeyError:
            self._reject(entry_id, fields, f"it has no field {FIELD.decode()!r}")
        except (msgspec.MsgspecError, HttpError) as error:
            self._reject(entry_id, fields, str(error))
        else:
            return event
        return None

    def _reject(self, entry_id: bytes, fields: Mapping[bytes, bytes], reason: str) -> None:
        metrics.REJECTED.inc()
        _log.warning("entry %s of the stream is no event: %s", entry_id.decode(), reason)
        kept = {**fields, b"entry": entry_id, b"reason": reason.encode()}
        self._client.xadd(f"{self._settings.name}:rejected", kept, maxlen=_REJECTED)


def _flat(entries: Any) -> list[Entry]:
    """Entries as pairs; the newer protocol puts them into one list more."""
    if entries and isinstance(entries[0], list) and entries[0] and isinstance(entries[0][0], tuple):
        return [entry for some in entries for entry in some]
    return list(entries)


def _counts(outcomes: list[Outcome]) -> dict[Outcome, int]:
    return {outcome: outcomes.count(outcome) for outcome in set(outcomes)}
