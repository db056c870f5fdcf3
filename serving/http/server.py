"""One process of a server: uvicorn on a listening socket, from start to drained."""

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from types import FrameType

import uvicorn

from hashtab.serving.http.app import App
from hashtab.serving.http.closing import SETTLE_S, take_all, turn_away
from hashtab.serving.http.door import Door
from hashtab.serving.http.logs import STDERR
from hashtab.serving.http.protocol import KEEP_ALIVE_S, Connection
from hashtab.serving.http.service import Service
from hashtab.serving.http.settings import ServerSettings

START_FAILED = 3  # the exit code of a process whose service could not start
_LINGER_S = 1.0  # between "not ready" and the end of listening: time to be told about it
STOP_S = 5.0  # for the service to stop, after the last answer
_TICKS_A_SECOND = 10  # of uvicorn
_CLOSE = (b"connection", b"close")

_log = logging.getLogger("hashtab.serving")


def serve(
    service: Service,
    settings: ServerSettings,
    listener: socket.socket,
    *,
    start_first: bool,
    parent: int | None = None,
) -> int:
    """Serve in this process until SIGTERM or SIGINT.

    Args:
        service: not started yet.
        settings: of the server.
        listener: a listening socket; other processes may hold it too.
        start_first: whether connections wait until the service has started, or another process
            takes them; if not, requests are told meanwhile that it is starting.
        parent: a descriptor that becomes readable when the process ends that this one must not
            outlive.

    Returns:
        The exit code: 0 if all went well, `START_FAILED`, or 1 if the service could not stop.
    """
    app = App(service, settings)
    server = _Server(app, listener.dup(), start_first=start_first, parent=parent)
    server.run([listener])
    STDERR.flush()
    return server.exit_code


def linger_s(settings: ServerSettings) -> float:
    """Return the seconds after SIGTERM in which new connections are still answered."""
    return min(_LINGER_S, settings.drain_s / 4)


def config_of(app: App) -> uvicorn.Config:
    """Return how uvicorn serves an application."""
    return uvicorn.Config(
        Door(app),
        loop="uvloop",
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )


class _Server(uvicorn.Server):
    def __init__(
        self, app: App, listener: socket.socket, *, start_first: bool, parent: int | None
    ) -> None:
        super().__init__(config_of(app))
        self.exit_code = 0
        self._app = app
        self._door: Door = self.config.app  # type: ignore[assignment]
        self._listener = listener  # stays open when the event loop has closed the others
        self._listener.setblocking(False)
        self._start_first = start_first
        self._parent = parent
        self._start: asyncio.Task[None] | None = None
        self._drain_at: float | None = None
        self._linger_s = linger_s(app.settings)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._parent is not None:
            asyncio.get_running_loop().add_reader(self._parent, self._drain)
        self._start = asyncio.create_task(self._app.lifecycle.start())
        self._start.add_done_callback(self._started)
        if self._start_first:
            await asyncio.wait([self._start])
        if not self.should_exit:
            await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_A_SECOND == 0:
            self._app.publish()
            self._door.publish()
        if self._drain_at is not None and time.monotonic() > self._drain_at + self._linger_s:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._stop_listening()
        await self._wait_for_last_requests()
        self._door.publish()
        waited = time.monotonic() - (self._drain_at or 0.0)
        left = max(0.0, self._app.settings.drain_s - waited)
        self.config.timeout_graceful_shutdown = left  # type: ignore[assignment]  # no need of int
        await super().shutdown(sockets)
        try:
            async with asyncio.timeout(STOP_S):
                await self._app.lifecycle.stop()
        except Exception:
            _log.exception("the service could not stop")
            self.exit_code = 1

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  of uvicorn
        if sig == signal.SIGINT and self._drain_at is not None:
            self.force_exit = True
        self._drain()

    def _drain(self) -> None:
        """Ask clients to go elsewhere; `on_tick` ends it."""
        if self._drain_at is not None:
            return
        self._drain_at = time.monotonic()
        self._app.lifecycle.draining = True
        self.config.encoded_headers.append(_CLOSE)
        self.server_state.default_headers = [*self.server_state.default_headers, _CLOSE]
        if self._start is not None and not self._start.done():
            self._start.cancel()
            self.should_exit = True

    def _started(self, start: asyncio.Task[None]) -> None:
        if start.cancelled():
            return
        if error := start.exception():
            _log.error("the service cannot start: %s", error, exc_info=error)
            self.exit_code = START_FAILED
            self.should_exit = True
            return
        # What a service has loaded lives as long as it does: collections need not visit it.
        gc.collect()
        gc.freeze()
        fields: dict[str, object] = {"process": os.getpid()}
        if reason := self._app.lifecycle.not_ready():
            fields["not_ready"] = reason
        _log.info("started" if reason else "ready", extra={"fields": fields})

    async def _stop_listening(self) -> None:
        if self._parent is None:  # else that is up to the parent: others may go on
            turn_away(self._listener)
        if not self.force_exit:
            await asyncio.sleep(SETTLE_S)
        for server in self.servers:
            server.close()
        await take_all(self._listener, lambda: Connection(self.config, self.server_state, {}))
        self._listener.close()

    async def _wait_for_last_requests(self) -> None:
        """Let clients whose connection was taken just now send what they took it for."""
        until = time.monotonic() + self._linger_s
        while self.server_state.connections and time.monotonic() < until:
            await asyncio.sleep(1 / _TICKS_A_SECOND)
