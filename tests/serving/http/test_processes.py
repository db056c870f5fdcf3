"""Several processes on one port, when they live and when they die."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hashtab.serving.http import ServerSettings, SettingsError, run
from tests.serving.http.servers import Running, running
from tests.serving.http.sockets import post

WHO = b"GET /process HTTP/1.1\r\nHost: here\r\n\r\n"
METRICS = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n"


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def who(server: Running) -> int:
    return int(server.ask(WHO).body)


async def who_at_once(server: Running, connections: int) -> list[int]:
    """Open connections, and ask on each which process has taken it."""
    lines = [await server.line() for _ in range(connections)]
    answers = [await line.ask(WHO) for line in lines]
    for line in lines:
        await line.close()
    return [int(answer.body) for answer in answers]


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2][:3]


def test_processes_share_the_port_and_the_metrics(tmp_path: Path) -> None:
    with running(tmp_path, "--processes", "2", "--drain-s", "0.4") as server:
        children = {line["process"] for line in server.wait_for("ready", 2)}
        seen: list[int] = []
        while set(seen) != children:
            seen += asyncio.run(who_at_once(server, 40))
            assert set(seen) <= children
        counted = (
            f'hashtab_http_requests_total{{endpoint="GET /process",status="200"}} {len(seen)}.0'
        )
        assert counted in server.ask(METRICS).body.decode()
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
        assert not any(lives(child) for child in children)
        assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_killed_process_is_replaced_and_the_others_go_on(tmp_path: Path) -> None:
    with running(tmp_path, "--processes", "2", "--drain-s", "0.4") as server:
        children = {line["process"] for line in server.wait_for("ready", 2)}
        victim = min(children)
        gauges = f"hashtab-metrics-*/gauge_live*_{victim}.db"
        wait_until(lambda: any(tmp_path.glob(gauges)))
        os.kill(victim, signal.SIGKILL)
        [line] = server.wait_for("a process died; another takes its place")
        assert (line["process"], line["exit_code"]) == (victim, -9)
        for _ in range(20):
            assert server.ask(post("/work", b"1")).status == 200
        [*_, third] = server.wait_for("ready", 3)
        wait_until(lambda: who(server) == third["process"])
        assert not any(tmp_path.glob(gauges))
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0


def test_processes_do_not_outlive_the_one_that_watches_them(tmp_path: Path) -> None:
    with running(tmp_path, "--processes", "2", "--drain-s", "0.4") as server:
        children = {line["process"] for line in server.wait_for("ready", 2)}
        server.process.kill()
        wait_until(lambda: not any(lives(child) for child in children))


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port}"):
            run("tests.serving.http.services:create", ServerSettings(port=port))
