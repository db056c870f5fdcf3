"""A lean HTTP/1.1 client: sockets and epoll in one thread, requests as bytes made beforehand.

It keeps the status and latency of each answer, and shows bodies only to who asks for them. What it
costs itself is measured against a server that answers a constant, `nothing.py`.
"""

import gc
import json
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

BROKEN = 0  # in place of a status: no answer came, or none that is HTTP
_CONNECT_S = 5.0
_PAUSE_S = 0.001  # after a connection broke, so that a server that is away is not asked in a loop
_END_OF_HEAD = b"\r\n\r\n"

Address = tuple[str, int]
Look = Callable[[int, int, bytes], None]
"""Is shown each answer: the number of the request in the load's list, status and body."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to send.

    Args:
        address: of the server.
        requests: whole HTTP requests, sent in turn.
        connections: kept open, each with one request at a time.
        seconds: to send for; what is in flight then is waited for.
        rate: requests a second that are due, however fast the answers come; by default a
            connection sends as soon as it has its answer.
        give_up: leave out, and count, what is due while no connection is free; by default it
            waits, and its latency counts from when it was due.
        answer_s: after which a request counts as broken.
    """

    address: Address
    requests: Sequence[bytes]
    connections: int = 1
    seconds: float = 5.0
    rate: float | None = None
    give_up: bool = False
    answer_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of a load; arrays have an entry for each request sent, in the order of answers.

    Args:
        statuses: `[N]`, `BROKEN` where no answer came.
        latencies: `[N]` seconds from when a request was due to the last byte of its answer.
        ends: `[N]` seconds from the load's begin to the answer.
        left_out: requests that were due and not sent.
        wall_s: of the load.
        client_cpu_s: of the client.
    """

    statuses: NDArray[np.int64]
    latencies: NDArray[np.float64]
    ends: NDArray[np.float64]
    left_out: int
    wall_s: float
    client_cpu_s: float

    @property
    def good(self) -> NDArray[np.bool_]:
        """Which requests were answered with 2xx."""
        return (self.statuses >= 200) & (self.statuses < 300)

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return float(self.good.sum()) / self.wall_s

    def count(self) -> dict[int, int]:
        """Count the answers by status."""
        values, counts = np.unique(self.statuses, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def milliseconds(self, percent: float, of: NDArray[np.bool_] | None = None) -> float:
        """Return a percentile of the latency of the good answers, or of those named."""
        chosen = self.latencies[self.good if of is None else of]
        return float(np.percentile(chosen, percent)) * 1e3 if len(chosen) else float("nan")


def request(
    method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> bytes:
    """Return the bytes of a request; a body that is not bytes already is sent as JSON."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    kind = {} if body is None or isinstance(body, bytes) else {"Content-Type": "application/json"}
    named = {"Host": "localhost", "Content-Length": str(len(raw)), **kind, **(headers or {})}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
    return "\r\n".join(lines).encode() + _END_OF_HEAD + raw


class Connection:
    """One connection with at most one request in flight; it opens where it is not open."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._received, self._needed = b"", -1

    def open(self) -> bool:
        """Open the connection; return whether it was not open already.

        Raises:
            OSError: if the server cannot be reached.
        """
        if self._socket is not None:
            return False
        self._socket = socket.create_connection(self._address, timeout=_CONNECT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return True

    def send(self, data: bytes) -> None:
        """Send a whole request.

        Raises:
            OSError: if the server cannot be reached or has closed the connection.
        """
        self._received, self._needed = b"", -1
        self.open()
        assert self._socket is not None
        self._socket.sendall(data)

    def receive(self) -> bool:
        """Take what has come, waiting for it where there is nothing; return whether it is all.

        Raises:
            OSError: if the connection broke.
        """
        assert self._socket is not None
        part = self._socket.recv(1 << 18)
        if not part:
            raise ConnectionResetError("the server closed the connection before its answer")
        self._received = self._received + part if self._received else part
        if self._needed < 0:
            end = self._received.find(_END_OF_HEAD)
            if end < 0:
                return False
            self._needed = end + len(_END_OF_HEAD) + _length(self._received[:end].lower())
        return len(self._received) >= self._needed

    def ask(self, data: bytes) -> tuple[int, bytes]:
        """Send a request and return status and body of its answer."""
        self.send(data)
        while not self.receive():
            pass
        answer = self.status, self.body
        self.close_if_told()
        return answer

    @property
    def status(self) -> int:
        """Of the answer."""
        return int(self._received[9:12])

    @property
    def body(self) -> bytes:
        """Of the answer."""
        return self._received[self._received.find(_END_OF_HEAD) + len(_END_OF_HEAD) :]

    def close_if_told(self) -> bool:
        """Close where the server does so after this answer; return whether it does."""
        head = self._received[: self._received.find(_END_OF_HEAD)].lower()
        told = b"\r\nconnection: close" in head
        if told:
            self.close()
        return told

    def close(self) -> None:
        """Close; the next request opens the connection again."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def fileno(self) -> int:
        """Return what epoll waits on, -1 while the connection is closed."""
        return self._socket.fileno() if self._socket else -1


def _length(head: bytes) -> int:
    _, found, after = head.partition(b"\r\ncontent-length:")
    return int(after.partition(b"\r\n")[0]) if found else 0


def drive(load: Load, look: Look | None = None) -> Measured:
    """Send a load from this thread and measure it."""
    gc.collect()
    gc.disable()
    try:
        return _Driver(load, look).run()
    finally:
        gc.enable()


@contextmanager
def in_own_process() -> Iterator[ProcessPoolExecutor]:
    """A process for a client, so that this one may do something else meanwhile."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(gc.collect).result()  # started, with all imported, before a load begins
        yield process


class _Driver:
    """One load on its way."""

    def __init__(self, load: Load, look: Look | None) -> None:
        self._load, self._look = load, look
        self._epoll = select.epoll()
        self._free = [Connection(load.address) for _ in range(load.connections)]
        self._busy: dict[int, tuple[Connection, float, int]] = {}  # with due time and number
        self._done: list[tuple[int, float, float]] = []  # status, latency, end
        self._due = self._left_out = 0

    def run(self) -> Measured:
        for connection in self._free:
            self._open(connection)
        cpu, begin = time.process_time(), time.monotonic()
        self._begin = begin
        until, looked = begin + self._load.seconds, begin
        while (now := time.monotonic()) < until or self._busy:
            if now < until:
                self._send_due(now)
            # By select, since epoll itself rounds its patience up to a millisecond.
            select.select([self._epoll], [], [], self._patience(now, until))
            for descriptor, _ in self._epoll.poll(0):
                self._take(descriptor)
            if now > looked + 1.0:
                looked = now
                self._expire(now)
        wall = time.monotonic() - begin
        self._epoll.close()
        for connection in self._free:
            connection.close()
        statuses, latencies, ends = zip(*self._done, strict=True) if self._done else ((), (), ())
        return Measured(
            statuses=np.array(statuses, np.int64),
            latencies=np.array(latencies, np.float64),
            ends=np.array(ends, np.float64),
            left_out=self._left_out,
            wall_s=wall,
            client_cpu_s=time.process_time() - cpu,
        )

    def _send_due(self, now: float) -> None:
        rate = self._load.rate
        if rate is None:
            while self._free:
                self._send(now)
            return
        wanted = int((now - self._begin) * rate) + 1
        while self._due < wanted and self._free:
            self._send(self._begin + self._due / rate)
        if self._load.give_up:
            self._left_out += wanted - self._due
            self._due = wanted

    def _send(self, due: float) -> None:
        number = self._due % len(self._load.requests)
        self._due += 1
        connection = self._free.pop()
        try:
            self._open(connection)
            connection.send(self._load.requests[number])
        except OSError:
            self._end(connection, due, number, broken=True)
            return
        self._busy[connection.fileno()] = connection, due, number

    def _open(self, connection: Connection) -> None:
        if connection.open():
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _patience(self, now: float, until: float) -> float:
        """How long nothing need be sent."""
        rate = self._load.rate
        if rate is None or not self._free or now >= until:
            return 1.0
        return max(self._begin + self._due / rate - now, 0.0)

    def _take(self, descriptor: int) -> None:
        if descriptor not in self._busy:  # the server closed a connection without a request
            next(c for c in self._free if c.fileno() == descriptor).close()
            return
        connection, due, number = self._busy[descriptor]
        try:
            whole = connection.receive()
        except OSError:
            del self._busy[descriptor]
            self._end(connection, due, number, broken=True)
            return
        if whole:
            del self._busy[descriptor]
            self._end(connection, due, number)

    def _end(self, connection: Connection, due: float, number: int, broken: bool = False) -> None:
        now = time.monotonic()
        status = BROKEN if broken else connection.status
        self._done.append((status, now - due, now - self._begin))
        if self._look is not None:
            self._look(number, status, b"" if broken else connection.body)
        if broken:
            connection.close()
            time.sleep(_PAUSE_S)
        else:
            connection.close_if_told()
        self._free.append(connection)

    def _expire(self, now: float) -> None:
        late = [
            descriptor
            for descriptor, (_, due, _) in self._busy.items()
            if now - due > self._load.answer_s
        ]
        for descriptor in late:
            self._end(*self._busy.pop(descriptor), broken=True)
