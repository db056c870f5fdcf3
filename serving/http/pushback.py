"""Bounds what refusals cost: who is refused and comes again at once is not always heard at once."""

import asyncio
import time

_A_SECOND = 10_000  # refusals in one of processor time: at some 20 µs each they take a fifth of it
_AT_ONCE = 500
_REFILL_S = 5e-3
_HOLD_S = 1e-3  # for each refusal beyond those, and
_SHORTEST_S, _LONGEST_S = 5e-3, 0.1  # far below what the answer's Retry-After asks for


class Pushback:
    """Stops reading connections for a moment, when there are more refusals than work can bear.

    It counts in the process's own time, so that the work gets its share on a busy machine too.
    Holding a connection costs more than a refusal; so few are held, and those for longer.
    """

    def __init__(self) -> None:
        self._left = float(_AT_ONCE)
        self._used_s = 0.0
        self._filling = False

    def refused(self, transport: asyncio.Transport) -> None:
        """Count a refusal; hold its connection if there were too many."""
        self._left -= 1
        if not self._filling:
            self._filling = True
            self._used_s = time.thread_time()
            asyncio.get_running_loop().call_later(_REFILL_S, self._refill)
        if self._left < 0 and not transport.is_closing():
            hold_s = min(_LONGEST_S, max(_SHORTEST_S, -self._left * _HOLD_S))
            transport.pause_reading()
            asyncio.get_running_loop().call_later(hold_s, _go_on, transport)

    def _refill(self) -> None:
        used_s = time.thread_time()
        self._left = min(_AT_ONCE, self._left + (used_s - self._used_s) * _A_SECOND)
        self._used_s = used_s
        self._filling = self._left < _AT_ONCE
        if self._filling:
            asyncio.get_running_loop().call_later(_REFILL_S, self._refill)


def _go_on(transport: asyncio.Transport) -> None:
    if not transport.is_closing():
        transport.resume_reading()
