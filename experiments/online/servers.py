"""Servers as processes of their own, and what /proc says that they use."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import psutil

from experiments.online.client import Address, Connection, request

ROOT = Path(__file__).resolve().parent.parent.parent
_PATIENCE_S = 120.0
_LOOK_S = 0.05


class Server:
    """A running server.

    Args:
        address: that it listens on.
        process: that was started.
        log: what it says.
    """

    def __init__(self, address: Address, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.address = address
        self.process = process
        self.log = log
        self._connection = Connection(address)

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Send one request and return status and body."""
        return self.ask_raw(request(method, path, body))

    def ask_raw(self, data: bytes) -> tuple[int, bytes]:
        """Send the bytes of a request and return status and body."""
        return self._connection.ask(data)

    def close(self) -> None:
        """Close the connection that `ask` uses."""
        self._connection.close()

    def cpu_s(self) -> float:
        """Return the CPU seconds of the server's processes until now."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(spent.user + spent.system for spent in times)

    def memory_mb(self) -> float:
        """Return the resident memory of the server's processes."""
        return sum(process.memory_info().rss for process in self._processes()) / 2**20

    def _processes(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    @property
    def ended(self) -> bool:
        """Whether the server has ended, however it did."""
        return self.process.poll() is not None

    def wait(self, ready: str) -> None:
        """Wait until a GET of the path `ready` is answered with 200."""
        deadline = time.monotonic() + _PATIENCE_S
        while not self._is_ready(ready):
            if self.ended or time.monotonic() > deadline:
                self._give_up()
            time.sleep(_LOOK_S)

    def _is_ready(self, path: str) -> bool:
        try:
            return self.ask("GET", path)[0] == 200
        except OSError:
            self._connection.close()
            return False

    def _give_up(self) -> NoReturn:
        said = self.log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"error: {self.process.args!r} does not become ready:\n{said}")


@contextmanager
def serving(
    command: Sequence[str],
    log: Path,
    ready: str = "/health/ready",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run a server, which is given `--port`, until the block ends.

    Args:
        command: of Python: a script or `-m` and a module, with options.
        log: file for what it says.
        ready: path that is answered with 200 once the server can be used.
        environment: variables beside those of this process.
    """
    port = free_port()
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, *command, f"--port={port}"],
            stdout=said,
            stderr=said,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
    server = Server(("127.0.0.1", port), process, log)
    try:
        server.wait(ready)
        yield server
    finally:
        server.close()
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
