"""Joins what many callers hand in at the same time into one durable change of the store."""

import asyncio
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from hashtab.serving.bse import metrics
from hashtab.serving.bse.applying import Outcome
from hashtab.serving.bse.writer import Writer
from hashtab.serving.store import Event

MOST = 1000  # events of one change
WAITING = 20_000  # events that wait before new ones are refused


@dataclass(frozen=True)
class _Handed:
    events: Sequence[Event]
    offsets: Mapping[str, bytes] = field(default_factory=dict)
    outcomes: "Future[list[Outcome]]" = field(default_factory=Future)


class TooManyWaitingError(Exception):
    """More events wait than can be written soon: the caller should come again later."""


class GroupCommit:
    """A thread that writes; while it waits for the disk, the next change gathers.

    Args:
        writer: writes.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._queue: queue.SimpleQueue[_Handed | None] = queue.SimpleQueue()
        self.waiting = 0
        self._stopped = False
        self._counting = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="group commit", daemon=True)
        self._thread.start()

    def submit(
        self, events: Sequence[Event], offsets: Mapping[str, bytes] | None = None
    ) -> "Future[list[Outcome]]":
        """Hand in events; the answer comes when they are durable.

        Raises:
            TooManyWaitingError: if too many wait already; none of these was taken.
        """
        handed = _Handed(events, offsets or {})
        with self._counting:
            if self._stopped or self.waiting > WAITING:
                raise TooManyWaitingError
            self.waiting += len(events)
            self._queue.put(handed)
        metrics.WAITING.set(self.waiting)
        return handed.outcomes

    async def written(self, events: Sequence[Event]) -> list[Outcome]:
        """Hand in events, and wait until they are durable; who no longer waits cancels nothing."""
        return await asyncio.shield(asyncio.wrap_future(self.submit(events)))

    def stop(self) -> None:
        """Write what was handed in, and end."""
        with self._counting:
            self._stopped = True  # nothing comes after what ends the thread
            self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            group, last = self._gather(first)
            # From here on nobody can withdraw them.
            self._write([h for h in group if h.outcomes.set_running_or_notify_cancel()])
            for handed in group:
                self._done(handed)
            if last:
                return

    def _gather(self, first: _Handed) -> tuple[list[_Handed], bool]:
        group, count = [first], len(first.events)
        while count < MOST:
            try:
                handed = self._queue.get_nowait()
            except queue.Empty:
                break
            if handed is None:
                return group, True
            group.append(handed)
            count += len(handed.events)
        return group, False

    def _write(self, group: list[_Handed]) -> None:
        if not group:
            return
        events = [event for handed in group for event in handed.events]
        offsets = {name: value for handed in group for name, value in handed.offsets.items()}
        begun = time.perf_counter()
        try:
            outcomes = self._writer.write(events, offsets)
        except Exception as error:  # whatever it is, those who wait must hear of it
            if len(group) > 1:
                # One of them may be what cannot be written: the others need not fail with it.
                for handed in group:
                    self._write([handed])
            else:
                group[0].outcomes.set_exception(error)
            return
        metrics.COMMIT_SECONDS.observe(time.perf_counter() - begun)
        metrics.COMMIT_EVENTS.observe(len(events))
        metrics.LAG_SECONDS.set(
            time.time() - max((event.time for event in events), default=0) / 1e6
        )
        place = 0
        for handed in group:
            handed.outcomes.set_result(outcomes[place : place + len(handed.events)])
            place += len(handed.events)

    def _done(self, handed: _Handed) -> None:
        with self._counting:
            self.waiting -= len(handed.events)
        metrics.WAITING.set(self.waiting)
