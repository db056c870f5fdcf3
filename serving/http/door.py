"""Says at the socket whether a request may enter, and refuses it there if too many wait to work.

Under ten times the load that a process can bear it refuses nine requests for each that it works on:
what refusals cost comes out of the work. Parsed and answered by the application one costs as much
as a small request; at the door it costs a fraction of that.
"""

import logging
import re
from collections.abc import Awaitable
from typing import NamedTuple

from starlette.types import Receive, Scope, Send

from hashtab.serving.http import metrics
from hashtab.serving.http.admission import TooBusyError
from hashtab.serving.http.answers import answer_of_error, header_lines, on_the_wire
from hashtab.serving.http.app import App
from hashtab.serving.http.pushback import Pushback
from hashtab.serving.http.routes import Route
from hashtab.serving.http.tracing import REQUEST_ID

_REMEMBERED = 1000  # heads of requests, of at most
_REMEMBERED_BYTES = 2048
_LENGTH = re.compile(rb"\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r")
_ID = re.compile(rb"\nx-request-id:[ \t]*(%s)[ \t]*\r" % REQUEST_ID.pattern, re.IGNORECASE)
# What moves the end of a message, or ends the connection after it, is left to the parser.
_SPECIAL = re.compile(rb"\n(?:transfer-encoding:|connection:(?![ \t]*keep-alive\r))")

_log = logging.getLogger("hashtab.serving")

Headers = list[tuple[bytes, bytes]]


class _Head(NamedTuple):
    """What the door reads of the head of a request for work.

    Args:
        body_bytes: that follow it.
        place: of the endpoint.
        request_id: header line of the answer, if it was given.
    """

    body_bytes: int
    place: int
    request_id: bytes


_NEVER = _Head(-1, 0, b"")  # to be refused here


class Door:
    """The way from the sockets of a process to its application.

    Args:
        app: that answers.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.pushback = Pushback()
        self._admission = app.admission
        self._arriving = 0
        self._work = [route for route in app.routes if route.endpoint.work]
        self._is_work = re.compile(b"|".join(map(_request_line, self._work)) or rb"(?!)")
        self._refused = [0] * len(self._work)
        self._heads: dict[bytes, _Head] = {}
        self._common: Headers = []
        self._common_lines = b""
        answer = answer_of_error(TooBusyError(), None)
        self._status = answer.status
        self._answer = on_the_wire(answer)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Let a request in that `arrive` counted."""
        self._arriving -= 1
        return self.app(scope, receive, send)

    def arrive(self) -> None:
        """Count a request that has not run yet: hundreds of them may come in one poll."""
        self._arriving += 1

    def is_full(self) -> bool:
        """Say whether further work will be refused, and may be here."""
        admission = self._admission
        room = admission.max_waiting + (not admission.busy)
        # While draining an answer must end its connection, which the application's do.
        return admission.waiting + self._arriving >= room and not self.app.lifecycle.draining

    def refuse(self, data: bytes, common: Headers) -> bytes | None:
        """Return the answer to a request that is refused, ready for the socket.

        Args:
            data: what came from a socket, from the beginning of a message.
            common: headers of all answers; the same object as long as they stay the same.

        Returns:
            None if the data is not exactly one request for work, and must be parsed.
        """
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = self._head(data[:end])
        if head.body_bytes != len(data) - end - 4:
            return None
        self._refused[head.place] += 1
        start, rest = self._answer
        return b"".join((start, self._lines(common), head.request_id, rest))

    def _head(self, data: bytes) -> _Head:
        """Read a head, or remember it: who is refused sends the same one again."""
        head = self._heads.get(data)
        if head is None:
            head = self._read(data)
            if len(self._heads) >= _REMEMBERED:
                self._heads.clear()
            if len(data) <= _REMEMBERED_BYTES:
                self._heads[data] = head
        return head

    def _read(self, data: bytes) -> _Head:
        plain = data.lower() + b"\r"
        found = self._is_work.match(data)
        lengths = _LENGTH.findall(plain)
        if found is None or len(lengths) != 1 or _SPECIAL.search(plain):
            return _NEVER
        given = _ID.search(data + b"\r")
        request_id = b"x-request-id: %s\r\n" % given[1] if given else b""
        return _Head(int(lengths[0]), (found.lastindex or 1) - 1, request_id)

    def publish(self) -> None:
        """Bring metrics and log up to date: refusals are too many to do it at each."""
        total = sum(self._refused)
        if not total:
            return
        for route, count in zip(self._work, self._refused, strict=True):
            route.measures.count(self._status, count)
        self._refused = [0] * len(self._work)
        metrics.REFUSED.labels(TooBusyError.reason).inc(total)
        _log.warning("refused requests at the door", extra={"fields": {"count": total}})

    def _lines(self, common: Headers) -> bytes:
        if common is not self._common:
            self._common, self._common_lines = common, header_lines(common)
        return self._common_lines


def _request_line(route: Route) -> bytes:
    """Return a pattern of how a request for an endpoint begins, in one group."""
    parts = re.split(r"\{[^}]*\}", route.endpoint.path)
    path = "[^/? ]+".join(map(re.escape, parts))
    return rf"({route.endpoint.method} {path})(?:\?[^ ]*)? HTTP/1\.1\r\n".encode("ascii")
