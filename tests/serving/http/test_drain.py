"""How a server ends: nothing that it took is broken."""

import asyncio
import signal
import time
from pathlib import Path

import pytest

from hashtab.serving.http.closing import SETTLE_S
from tests.serving.http.servers import Load, Running, running
from tests.serving.http.sockets import post

READY = b"GET /health/ready HTTP/1.1\r\nHost: here\r\n\r\n"


async def nobody_is_taken_any_more(server: Running) -> None:
    while True:
        try:
            async with await asyncio.wait_for(server.line(), timeout=0.2):
                await asyncio.sleep(0.01)
        except (ConnectionRefusedError, TimeoutError):
            return


@pytest.mark.parametrize("processes", [1, 2])
def test_a_server_that_ends_under_load_breaks_no_request(processes: int, tmp_path: Path) -> None:
    with running(tmp_path, "--processes", str(processes), "--drain-s", "1") as server:
        server.wait_for("ready", processes)

        async def check() -> tuple[Load, Load]:
            load, ready = Load(), Load()
            clients = [load.keep_asking(server, post("/work", b"0.5")) for _ in range(8)]
            asking = asyncio.gather(*clients, ready.keep_asking(server, READY))
            await asyncio.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            await asking
            return load, ready

        load, ready = asyncio.run(check())
        assert server.ended() == 0
        assert load.broken == ready.broken == []
        assert set(load.statuses) == {200}
        assert ready.statuses[503] > 0
        assert load.told_to_close > 0
        asked = sum(load.statuses.values()) + sum(ready.statuses.values())
        assert len(server.events("request")) == asked


def test_work_in_flight_is_finished_after_the_last_connection_was_taken(tmp_path: Path) -> None:
    with running(tmp_path, "--drain-s", "2") as server:
        server.wait_for("ready")

        async def check() -> int:
            async with await server.line() as line:
                await line.write(post("/sleep", b"1800"))
                await asyncio.sleep(0.2)
                server.process.send_signal(signal.SIGTERM)
                return (await line.read()).status

        assert asyncio.run(check()) == 200
        assert server.ended() == 0


def test_work_that_outlasts_the_drain_is_told_so(tmp_path: Path) -> None:
    with running(tmp_path, "--drain-s", "0.6") as server:
        server.wait_for("ready")

        async def check() -> tuple[int, str]:
            async with await server.line() as line:
                await line.write(post("/sleep", b"60000"))
                await asyncio.sleep(0.2)
                server.process.send_signal(signal.SIGTERM)
                response = await line.read()
                return response.status, response.json["error"]

        status, message = asyncio.run(check())
        assert (status, "stopped" in message) == (503, True)
        assert server.ended() == 0


def test_a_connection_taken_at_the_last_moment_is_served(tmp_path: Path) -> None:
    with running(tmp_path, "--drain-s", "4") as server:
        server.wait_for("ready")

        async def check() -> int:
            async with await server.line() as last:
                server.process.send_signal(signal.SIGTERM)
                await nobody_is_taken_any_more(server)
                await asyncio.sleep(SETTLE_S)
                return (await last.ask(post("/work", b"1"))).status

        assert asyncio.run(check()) == 200
        assert server.ended() == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_server_that_still_starts_ends_at_once(processes: int, tmp_path: Path) -> None:
    with running(tmp_path, "--processes", str(processes), create="create_slow") as server:
        server.wait_for("starting", processes)
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert server.ended() == 0
        assert time.monotonic() - began < 30  # it would start for sixty


def test_a_server_that_still_starts_says_so(tmp_path: Path) -> None:
    with running(tmp_path, create="create_slow") as server:
        response = server.ask(READY)
        assert (response.status, response.json["error"]) == (503, "starting")
        assert server.ask(post("/work", b"1")).status == 503


def test_ctrl_c_ends_a_server_as_sigterm_does(tmp_path: Path) -> None:
    with running(tmp_path, "--drain-s", "0.4") as server:
        server.wait_for("ready")
        server.process.send_signal(signal.SIGINT)
        assert server.ended() == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_service_that_cannot_start_ends_its_server(processes: int, tmp_path: Path) -> None:
    options = ["--processes", str(processes)]
    with running(tmp_path, *options, create="create_broken") as server:
        assert server.ended() != 0
        assert "no bundle at /nowhere" in str(server.log())
