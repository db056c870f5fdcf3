"""Servers in processes of their own, and clients that keep them busy."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.serving.http.client import Response
from tests.serving.http.sockets import Line

ROOT = Path(__file__).parents[3]
_PATIENCE_S = 60.0


class Running:
    """A server in a process of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self._log = log
        self.port = 0

    def log(self) -> list[dict[str, Any]]:
        """Lines of its log so far; the last may not be whole yet."""
        text = self._log.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["event"] == name]

    def wait_for(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait until the log has so many lines of an event."""
        until = time.monotonic() + _PATIENCE_S
        while len(found := self.events(event)) < count:
            assert time.monotonic() < until, self._log.read_text()
            time.sleep(0.01)
        return found

    def ended(self) -> int:
        """Wait for its end; its exit code."""
        return self.process.wait(_PATIENCE_S)

    async def line(self) -> Line:
        return await Line.to(self.port)

    def ask(self, data: bytes) -> Response:
        """Send one request on a connection of its own."""

        async def asked() -> Response:
            async with await self.line() as line:
                return await line.ask(data)

        return asyncio.run(asked())


@contextmanager
def running(folder: Path, *options: str, create: str = "create") -> Iterator[Running]:
    """Start a server of one of tests/serving/http/services.py and wait until it listens."""
    service = f"tests.serving.http.services:{create}"
    command = [sys.executable, "-m", "tests.serving.http.serve", service, "--port", "0", *options]
    environment = {**os.environ, "TMPDIR": str(folder)}
    log = folder / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stderr=errors, env=environment)
    try:
        server = Running(process, log)
        [said] = server.wait_for("listening")
        server.port = int(said["url"].rpartition(":")[2])
        yield server
    finally:
        process.kill()
        process.wait()


@dataclass
class Load:
    """What clients with keep-alive connections saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    told_to_close: int = 0

    async def keep_asking(self, server: Running, request: bytes) -> None:
        """Send a request again and again until nothing listens any more."""
        while True:
            try:
                line = await server.line()
            except ConnectionRefusedError:
                return
            async with line:
                try:
                    while await self._ask(line, request):
                        pass
                except (OSError, EOFError) as error:
                    self.broken.append(repr(error))

    async def _ask(self, line: Line, request: bytes) -> bool:
        response = await line.ask(request)
        self.statuses[response.status] += 1
        closes = response.headers.get("connection") == "close"
        self.told_to_close += closes
        return not closes
