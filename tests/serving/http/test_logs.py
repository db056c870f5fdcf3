"""Logs: one JSON object a line, complete, whole and without users' ids."""

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hashtab.serving.http import ServerSettings, build_app, logs
from hashtab.serving.http.logs import JsonHandler, Lines
from tests.serving.http.client import Client
from tests.serving.http.services import Example


class Log:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.lines = Lines(self.descriptor)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path / "log")
    yield log
    os.close(log.descriptor)


def test_a_request_leaves_one_line(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hashtab.serving.http.app.STDERR", log.lines)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with Client(build_app(Example(), ServerSettings())) as client:
        client.get("/users/17?secret=1", **{"X-Request-Id": "r1", "traceparent": parent})
    log.lines.flush()
    [line] = log.read()
    assert line.pop("time")
    assert line.pop("ms") > 0
    assert line == {
        "level": "info",
        "event": "request",
        "method": "GET",
        "path": "/users/{user}",
        "status": 200,
        "request_id": "r1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/17/users/17", 404),
        ("GET", "/users/17/", 404),
        ("POST", "/users/17", 405),
        ("GET", "/users/17%FF", 400),
    ],
)
def test_whom_a_wrong_path_names_is_not_logged(
    method: str, path: str, status: int, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hashtab.serving.http.app.STDERR", log.lines)
    with Client(build_app(Example(), ServerSettings())) as client:
        assert client.request(method, path).status == status
    log.lines.flush()
    [line] = log.read()
    assert "17" not in line["path"]
    assert "/users/-" in line["path"]


def test_lines_are_written_soon_even_if_the_loop_of_the_first_has_ended(log: Log) -> None:
    async def add(n: int) -> None:
        log.lines.add({"n": n})

    async def add_and_wait(n: int) -> None:
        await add(n)
        while not log.read():
            await asyncio.sleep(0.01)

    asyncio.run(add(1))
    asyncio.run(asyncio.wait_for(add_and_wait(2), timeout=20))
    assert log.read() == [{"n": 1}, {"n": 2}]


def test_many_lines_do_not_wait_for_the_timer(log: Log) -> None:
    async def check() -> None:
        for n in range(2000):
            log.lines.add({"n": n})

    asyncio.run(check())
    written = log.read()
    assert len(written) > 1000
    log.lines.flush()
    assert log.read() == [{"n": n} for n in range(2000)]


def test_a_message_keeps_its_place_among_requests(log: Log) -> None:
    async def check() -> None:
        log.lines.add({"n": 1})
        log.lines.write({"n": 2})

    asyncio.run(check())
    assert log.read() == [{"n": 1}, {"n": 2}]


def test_an_exception_is_one_line_with_its_traceback(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "STDERR", log.lines)
    logger = logging.Logger("test")
    logger.addHandler(JsonHandler())
    try:
        raise ValueError("line 1\nline 2")
    except ValueError:
        logger.exception("it %s", "failed", extra={"fields": {"request_id": "r1"}})
    [line] = log.read()
    assert (line["level"], line["event"], line["request_id"]) == ("error", "it failed", "r1")
    assert "ValueError: line 1\nline 2" in line["traceback"]


def test_a_full_pipe_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    lines = Lines(writing)

    async def check() -> bytes:
        loop = asyncio.get_running_loop()
        write = loop.run_in_executor(None, lines.write, "x" * 500_000)
        read = b""
        while not read.endswith(b"\n"):
            read += await loop.run_in_executor(None, os.read, reading, 65_536)
        await write
        return read

    assert json.loads(asyncio.run(check())) == "x" * 500_000
    os.close(reading)
    lines.write("nobody reads this, and nothing fails")
    os.close(writing)
