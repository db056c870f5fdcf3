"""A real Redis server on a unix socket, in a folder of its own."""

import os
import shutil
import socket as socketlib
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def listens(path: Path) -> bool:
    """Whether a server accepts connections; its file is there a moment earlier."""
    with socketlib.socket(socketlib.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[Path]:
    """Start a server with the options; give its socket; end it."""
    program = shutil.which("redis-server")
    if program is None:
        if "CI" in os.environ:
            pytest.fail("redis-server is missing, and CI tests both stores")
        pytest.skip("redis-server is not installed")
    socket = folder / "socket"
    fixed = ["--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--save", ""]
    socket.unlink(missing_ok=True)  # of a server that was killed here
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([program, *fixed, *options], stdout=log, stderr=log)
    try:
        for _ in range(500):
            if listens(socket):
                break
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.01)
        yield socket
    finally:
        server.kill()
        server.wait()
