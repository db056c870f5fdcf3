"""Sends bad requests and judges the answers: the right code, a message, and a server that lives."""

import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from experiments.online.bad_requests import Bad
from experiments.online.client import Connection
from experiments.online.servers import Server

_PATIENCE_S = 5.0
_LOOK_EVERY = 200  # requests, after which a good one must be answered as ever
_BUSY = 503  # a deadline or draining, and the one status from 500 on that is no fault

Shown = Callable[[str], None]


class Answer(NamedTuple):
    """A status, and the body."""

    status: int
    body: bytes


@dataclass(kw_only=True)
class Found:
    """What the requests came to.

    Args:
        sent: requests by kind.
        statuses: answers by status; 0 where the server closed the connection instead.
        faults: what was wrong, each with the request's file.
    """

    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Fuzz:
    """One server under bad requests.

    Args:
        server: running.
        good: a request that is answered with 200.
        folder: for the requests whose answers were wrong, so that they can be sent again.
    """

    def __init__(self, server: Server, good: bytes, folder: Path) -> None:
        self._server, self._good, self._folder = server, good, folder
        self._connection = Connection(server.address)
        self._as_ever = self._connection.ask(good)
        self.found = Found()
        if self._as_ever[0] != 200:
            raise SystemExit(f"error: a good request is answered {self._as_ever}")

    def run(self, requests: Iterator[Bad]) -> Found:
        """Send requests and judge each answer; a good one in between must be answered as ever."""
        for number, bad in enumerate(requests):
            self._send(bad)
            if number % _LOOK_EVERY == 0:
                self._look(bad)
        self._look(None)
        self._connection.close()
        return self.found

    def _send(self, bad: Bad) -> None:
        self.found.sent[bad.kind] += 1
        answer = exchange(self._server.address, bad.data) if bad.broken else self._ask(bad.data)
        self.found.statuses[answer.status if answer else 0] += 1
        fault = judge(bad, answer)
        if fault is not None:
            self._note(bad, fault)

    def _ask(self, data: bytes) -> Answer | None:
        try:
            return Answer(*self._connection.ask(data))
        except (OSError, ValueError):
            self._connection.close()
            return None

    def _look(self, last: Bad | None) -> None:
        if self._server.ended:
            raise SystemExit(f"error: the server ended; its log is {self._server.log}")
        self._connection.close()
        if self._connection.ask(self._good) != self._as_ever:
            self._note(last, "a good request is answered otherwise than before")

    def _note(self, bad: Bad | None, fault: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{len(self.found.faults):05d}.request"
        path.write_bytes(bad.data if bad else self._good)
        kind = bad.kind if bad else "the last"
        self.found.faults.append(f"{kind}: {fault}; sent again with --replay {path}")


def judge(bad: Bad, answer: Answer | None) -> str | None:
    """Return what is wrong with an answer, None where it is right."""
    if answer is None:
        return None if bad.broken else "there was no answer"
    status, body = answer
    said = body[:300].decode(errors="replace")
    if status >= 500 and status != _BUSY:
        return f"answered {status}: {said}"
    if status not in bad.statuses and status != _BUSY:
        return f"answered {status} and not {sorted(bad.statuses)}: {said}"
    if status < 400:
        return None
    try:
        error = json.loads(body)
        message = f"{error.get('field', '')} {error['error']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"answered {status} without a message: {said}"
    if bad.names is not None and status != _BUSY and bad.names not in message:
        return f"the message does not name {bad.names!r}: {said}"
    return None


def exchange(address: tuple[str, int], data: bytes) -> Answer | None:
    """Send bytes on a connection of their own, end it there, and read what comes back.

    Returns:
        The first answer; None where the server closed the connection without one.

    Raises:
        TimeoutError: if the server does neither.
    """
    with socket.create_connection(address, timeout=_PATIENCE_S) as connection:
        with suppress(OSError):  # a server may answer, and close, before it has read all
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                received += part
    received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    head, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return None
    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return Answer(int(head.split(b" ")[1]), body[: int(length or 0)])
