"""Who may work now: one call at a time, in the order of arrival; too many are refused early."""

import asyncio
import time
from collections import deque

from hashtab.serving.http.errors import HttpError

_RETRY_AFTER_S = 1  # the smallest that the header can say; a full queue is worked off in less


class RefusedError(HttpError):
    """A call that is not worked on.

    Attributes:
        reason: in metrics.
    """

    reason: str


class TooBusyError(RefusedError):
    """Too many calls wait."""

    reason = "full"

    def __init__(self) -> None:
        super().__init__(
            429, "too many requests wait; send it again later", retry_after_s=_RETRY_AFTER_S
        )


class DeadlineError(RefusedError):
    """A call's deadline passed before its turn came."""

    reason = "deadline"

    def __init__(self) -> None:
        super().__init__(
            503,
            "the deadline passed before the request's turn came; send it again later",
            retry_after_s=_RETRY_AFTER_S,
        )


class Admission:
    """The queue of a process for calls that take the processor.

    Between two calls the event loop polls its sockets once, so that whoever comes while it is full
    is told so after one call at the most.

    Args:
        max_waiting: calls beside the one that works.

    Attributes:
        waiting: calls that wait now.
        busy: whether one works now.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.waiting = 0
        self.busy = False
        self._queue: deque[asyncio.Future[None]] = deque()

    def check_room(self) -> None:
        """Refuse a call that could not wait.

        Raises:
            TooBusyError: if too many wait already.
        """
        if self.busy and self.waiting >= self.max_waiting:
            raise TooBusyError

    async def take_turn(self, deadline: float) -> None:
        """Wait until it is this call's turn; whoever returns from here must call `leave`.

        Args:
            deadline: of `time.monotonic()`.

        Raises:
            TooBusyError: at once, if too many wait already.
            DeadlineError: as soon as the deadline has passed.
        """
        if time.monotonic() > deadline:  # the body came slowly
            raise DeadlineError
        if not self.busy:
            self.busy = True
            return
        self.check_room()
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(deadline - time.monotonic(), self._expire, turn)
        self._queue.append(turn)
        self.waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            self._cancelled(turn)
            raise
        finally:
            timer.cancel()
        if time.monotonic() > deadline:
            self.leave()
            raise DeadlineError

    def leave(self) -> None:
        """Give the turn to the next call."""
        if not self._pass_on():
            # Not free yet: calls that became runnable in this same round of the event loop would
            # work one after another, and no socket would be polled between them.
            asyncio.get_running_loop().call_soon(self._free)

    def _free(self) -> None:
        if not self._pass_on():
            self.busy = False

    def _pass_on(self) -> bool:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                self.waiting -= 1
                turn.set_result(None)
                return True
        return False

    def _expire(self, turn: asyncio.Future[None]) -> None:
        if not turn.done():
            self.waiting -= 1
            turn.set_exception(DeadlineError())

    def _cancelled(self, turn: asyncio.Future[None]) -> None:
        if turn.cancelled():
            self.waiting -= 1
        elif turn.exception() is None:
            self.leave()  # the turn came together with the cancellation
