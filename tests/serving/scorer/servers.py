"""A scorer in a process of its own, and the smallest client of it."""

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

PATIENCE_S = 60.0


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A running scorer."""

    def __init__(self, url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.address = urlsplit(url).netloc
        self.process = process
        self.log = log

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Send one request over a connection of its own; `body` is bytes, or sent as JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE_S)
        try:
            sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            said = {} if sent is None else {"Content-Type": "application/json"}
            connection.request(method, path, sent, said | (headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, answer.read())
        finally:
            connection.close()

    def score(self, **asked: Any) -> Any:
        answer = self.ask("POST", "/v1/score", asked)
        assert answer.status == 200, answer.body
        return answer.json

    def load(self, bundle: Path) -> Answer:
        return self.ask("POST", "/v2/repository/models/hashtab/load", {"bundle": str(bundle)})

    def events(self) -> list[str]:
        """What it has logged by now, whole lines only."""
        lines = self.log.read_text().split("\n")[:-1]
        return [json.loads(line)["event"] for line in lines]

    def models(self) -> Any:
        return self.ask("GET", "/v1/models").json

    def metric(self, line: str) -> float:
        """The value of a metric's line, named with its labels; 0 where there is none yet."""
        for text in self.ask("GET", "/metrics").body.decode().splitlines():
            if text.startswith(f"{line} "):
                return float(text.rpartition(" ")[2])
        return 0.0


def wait_for(found: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Wait until something is true, and return it."""
    until = time.monotonic() + patience_s
    while not (value := found()):
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.02)
    return value


@contextmanager
def scorer(folder: Path, *options: object, ready: bool = True) -> Iterator[Server]:
    """Start a scorer on a free port, wait until it is ready, and stop it in the end."""
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    command = [sys.executable, "-m", "hashtab.serving.scorer", "--port", "0", *map(str, options)]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors, cwd=folder)
    try:
        server = Server(wait_for(lambda: _listening(process, log)), process, log)
        if ready:
            wait_for(lambda: server.ask("GET", "/health/ready").status == 200)
        yield server
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0, log.read_text()


def _listening(process: "subprocess.Popen[bytes]", log: Path) -> str | None:
    assert process.poll() is None, log.read_text()
    for line in log.read_text().splitlines():
        if '"event":"listening"' in line:
            return str(json.loads(line)["url"])
    return None
