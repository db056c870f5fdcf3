"""Ids by which a request is found again in the logs of all who handled it."""

import itertools
import os
import re
from collections.abc import Mapping

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")  # what is fit to be sent back
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")

_process = os.urandom(6).hex()
_numbers = itertools.count()


class Trace:
    """The ids of one request.

    Args:
        headers: by lower-case name; `X-Request-Id` and W3C's `traceparent` count where they are fit
            to be sent back.

    Attributes:
        request_id: as given, or made here.
        trace_id: the trace's part of `traceparent`, None without one.
        headers: of the answer.
    """

    __slots__ = ("headers", "request_id", "trace_id")

    def __init__(self, headers: Mapping[bytes, bytes]) -> None:
        given = headers.get(b"x-request-id")
        if given is None or not REQUEST_ID.fullmatch(given):
            given = f"{_process}-{next(_numbers):x}".encode("ascii")
        self.request_id = given.decode("ascii")
        self.headers = [(b"x-request-id", given)]
        self.trace_id: str | None = None
        parent = headers.get(b"traceparent")
        if parent is not None and (found := _TRACEPARENT.fullmatch(parent)):
            self.trace_id = found[1].decode("ascii")
            self.headers.append((b"traceparent", parent))

    def fields(self) -> dict[str, str | None]:
        """Return the ids by name, for a line of the log."""
        return {"request_id": self.request_id, "trace_id": self.trace_id}
