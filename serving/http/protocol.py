"""Uvicorn's HTTP connection, with the door before it and the limits that it leaves out."""

import asyncio
import re
from asyncio import TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hashtab.serving.http import metrics
from hashtab.serving.http.answers import answer_of_error, header_lines, on_the_wire
from hashtab.serving.http.app import GONE
from hashtab.serving.http.door import Door
from hashtab.serving.http.errors import HttpError

KEEP_ALIVE_S = 65  # longer than the 60 s of common load balancers, so that they close first
_MAX_CONNECTIONS = 800  # the usual limit of open files is 1024, and a service opens some too
_MAX_HEAD_BYTES = 64 << 10
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_MESSAGE_S = 30.0  # from the first byte of a request to its last


def _without_upgrade(data: bytes) -> bytes:
    """Cut the offer of another protocol out of a head: the parser would drop the body for it.

    Clients that know HTTP/2, Java's among them, offer it on plain connections with each request.
    """
    head, end, body = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head) + end + body


class Connection(HttpToolsProtocol):
    """One connection; uvicorn makes it, for a `Door` as its application."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._door: Door = self.config.loaded_app
        self._between_messages = True
        self._in_head = False
        self._head_bytes = 0
        self._refused_at = 0.0
        self._patience: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or say that there are too many."""
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS:
            error = HttpError(503, "too many connections are open", retry_after_s=1)
            self._close_with(error, "connections")
        else:
            self._wait_for_request(self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell a request that waits that nobody waits for it."""
        self._stop_waiting()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.scope["state"][GONE] = True
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Refuse or parse what came."""
        if self._between_messages:
            if self._door.is_full() and self._refuse(data):
                return
            if b"pgrade" in data:
                data = _without_upgrade(data)
        super().data_received(data)
        if not self._between_messages and not self.transport.is_closing():
            self._wait_for_rest(len(data))

    def on_message_begin(self) -> None:
        """Note the first byte of a request."""
        self._between_messages = False
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note the end of a request's head."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note the last byte of a request."""
        self._between_messages = True
        self._stop_waiting()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        self._close_with(HttpError(400, msg), "broken")

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which nothing came for long; refusals do not set the timer."""
        silent = self.loop.time() - self._refused_at
        if silent < self.timeout_keep_alive:
            self._wait_for_request(self.timeout_keep_alive - silent)
        else:
            super().timeout_keep_alive_handler()

    def _start_asgi_task(self, *args: Any) -> None:
        self._door.arrive()
        super()._start_asgi_task(*args)

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: clients offer HTTP/2 like that, and go on without."""

    def _refuse(self, data: bytes) -> bool:
        if self.cycle is not None and not self.cycle.response_complete:
            return False  # it must not overtake the answer before it
        answer = self._door.refuse(data, self.server_state.default_headers)
        if answer is None:
            return False
        self._refused_at = self.loop.time()
        self.transport.write(answer)
        self._door.pushback.refused(self.transport)
        return True

    def _wait_for_request(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    def _wait_for_rest(self, received: int) -> None:
        if self._in_head:
            self._head_bytes += received
            if self._head_bytes > _MAX_HEAD_BYTES:
                error = HttpError(431, f"the head is larger than {_MAX_HEAD_BYTES} bytes")
                self._close_with(error, "head")
                return
        if self._patience is None:
            self._patience = self.loop.call_later(_MESSAGE_S, self._lose_patience)

    def _lose_patience(self) -> None:
        if self.cycle is not None and self.cycle.response_started and not self._in_head:
            self.transport.close()  # the answer went out before the body was all here
        else:
            self._close_with(HttpError(408, f"it did not come in {_MESSAGE_S:g} s"), "slow")

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _close_with(self, error: HttpError, reason: str) -> None:
        metrics.REFUSED.labels(reason).inc()
        start, rest = on_the_wire(answer_of_error(error, None))
        common = header_lines([*self.server_state.default_headers, (b"connection", b"close")])
        self.transport.write(b"".join((start, common, rest)))
        self.transport.close()
