"""Several processes on one listening socket, and the one that watches over them."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType

from prometheus_client.multiprocess import mark_process_dead

from hashtab.serving.http.closing import turn_away
from hashtab.serving.http.creation import Create, service_of
from hashtab.serving.http.logs import log_as_json
from hashtab.serving.http.metrics import MULTIPROCESS_FOLDER
from hashtab.serving.http.server import START_FAILED, STOP_S, linger_s, serve
from hashtab.serving.http.settings import ServerSettings

_RESTART_S = 1.0  # between two starts of a process that does not live longer than that
_SPAWN = multiprocessing.get_context("spawn")

_log = logging.getLogger("hashtab.serving")


def supervise(create: Create, settings: ServerSettings, listener: socket.socket) -> int:
    """Serve in several processes until SIGTERM or SIGINT.

    They share one listening socket: a process that dies loses the requests that it had, and no
    connection that it had not taken yet.

    Args:
        create: makes the service in each.
        settings: of the server.
        listener: a listening socket.

    Returns:
        The exit code: 0 if all ended well.
    """
    with tempfile.TemporaryDirectory(prefix="hashtab-metrics-") as folder:
        os.environ[MULTIPROCESS_FOLDER] = folder
        try:
            return _Watch(create, settings, listener).run()
        finally:
            del os.environ[MULTIPROCESS_FOLDER]


def _serve_in_child(create: Create, settings: ServerSettings, listener: socket.socket) -> None:
    log_as_json()
    parent = multiprocessing.parent_process()
    assert parent is not None
    try:
        service = service_of(create)
    except Exception:
        _log.exception("the service cannot be made")
        sys.exit(START_FAILED)
    sys.exit(serve(service, settings, listener, start_first=True, parent=parent.sentinel))


@dataclass
class _Child:
    process: SpawnProcess
    began: float
    first: bool  # of its place; later ones replace one that died


class _Watch:
    def __init__(self, create: Create, settings: ServerSettings, listener: socket.socket) -> None:
        self._create = create
        self._settings = settings
        self._listener = listener
        self._told: Connection
        self._told, self._tell = _SPAWN.Pipe(duplex=False)
        self._children: list[_Child] = []

    def run(self) -> int:
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._children = [self._start(first=True) for _ in range(self._settings.processes)]
            return self._end(self._watch())
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  of signal
        self._tell.send_bytes(b"stop")

    def _start(self, *, first: bool) -> _Child:
        process = _SPAWN.Process(
            target=_serve_in_child,
            args=(self._create, self._settings, self._listener),
            daemon=True,  # an exception here must not leave them behind
        )
        process.start()
        return _Child(process, time.monotonic(), first)

    def _watch(self) -> int:
        """Start processes again until told to stop, or until one cannot start at all."""
        while True:
            wait([self._told, *(child.process.sentinel for child in self._children)])
            if self._told.poll():
                return 0
            for place, child in enumerate(self._children):
                code = child.process.exitcode
                if code is None:
                    continue
                if child.first and code == START_FAILED:
                    return code
                if not self._replace(place, child):
                    return 0

    def _replace(self, place: int, dead: _Child) -> bool:
        """Start a process in a dead one's place, unless told to stop first."""
        fields = {"process": dead.process.pid, "exit_code": dead.process.exitcode}
        _log.error("a process died; another takes its place", extra={"fields": fields})
        mark_process_dead(dead.process.pid)  # type: ignore[no-untyped-call]
        rest = dead.began + _RESTART_S - time.monotonic()
        if self._told.poll(max(0.0, rest)):
            return False
        self._children[place] = self._start(first=False)
        return True

    def _end(self, code: int) -> int:
        for child in self._children:
            child.process.terminate()
        if code == 0:
            time.sleep(linger_s(self._settings))
        turn_away(self._listener)
        self._listener.close()  # the others hold it for as long as they take connections
        until = time.monotonic() + self._settings.drain_s + 2 * STOP_S
        for child in self._children:
            child.process.join(max(0.0, until - time.monotonic()))
            if child.process.exitcode is None:
                child.process.kill()
                child.process.join()
            # One that had no handler for the signal yet had no requests either.
            if child.process.exitcode not in (0, -signal.SIGTERM):
                code = code or 1
        return code
