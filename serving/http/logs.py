"""Logs as JSON, one object a line, on standard error."""

import asyncio
import atexit
import logging
import os
import select
import sys
import threading
import traceback
from datetime import UTC, datetime
from typing import Any

import msgspec

_FLUSH_S = 0.1  # a line of a request waits no longer; a kill -9 loses no more than that
_AT_ONCE = 512  # lines in one write


class RequestLine(msgspec.Struct):
    """The line of one request; all have the same fields."""

    time: datetime
    level: str
    event: str
    method: str
    path: str
    status: int
    ms: float
    request_id: str
    trace_id: str | None


class Lines:
    """Collects lines and writes them in few calls; nothing is lost at a regular exit.

    Args:
        descriptor: of the open file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._encode = msgspec.json.Encoder().encode
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._due_in: asyncio.AbstractEventLoop | None = None

    def add(self, line: Any) -> None:
        """Write a line within a tenth of a second; call it in the event loop's thread."""
        encoded = self._encode(line)
        with self._lock:
            self._lines.append(encoded)
        loop = asyncio.get_running_loop()
        if self._due_in is not loop:
            self._due_in = loop
            loop.call_later(_FLUSH_S, self.flush)
        elif len(self._lines) >= _AT_ONCE:
            self.flush()

    def write(self, line: Any) -> None:
        """Write a line now, after those that came before it; from any thread."""
        encoded = self._encode(line)
        with self._lock:
            self._lines.append(encoded)
            self._write()

    def flush(self) -> None:
        """Write what was collected."""
        self._due_in = None
        with self._lock:
            self._write()

    def _write(self) -> None:
        if not self._lines:
            return
        left = memoryview(b"\n".join(self._lines) + b"\n")
        self._lines.clear()
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError:
                return  # nobody reads the log any more; the service goes on without it


STDERR = Lines(2)
atexit.register(STDERR.flush)


class JsonHandler(logging.Handler):
    """Writes the records of `logging`; `extra={"fields": {...}}` adds fields to a line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        try:
            STDERR.write(line)
        except Exception:  # a log that cannot be written must not stop who writes it
            self.handleError(record)


def log_as_json() -> None:
    """Send all records of `logging` from INFO on to standard error as JSON."""
    logging.basicConfig(level=logging.INFO, handlers=[JsonHandler()], force=True)
    # Its starts are told by "listening" and "ready", requests that are not HTTP by the metrics.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    sys.excepthook = _log_exception


def _log_exception(*error: Any) -> None:
    logging.getLogger("hashtab.serving").critical("stopped by an exception", exc_info=error)
