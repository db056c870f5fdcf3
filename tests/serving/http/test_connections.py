"""What happens on a connection before and beside the application."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from hashtab.serving.http import ServerSettings, build_app, protocol, pushback
from hashtab.serving.http.door import Door
from tests.serving.http.services import Example
from tests.serving.http.sockets import Line, Server, post

CHUNKED = (
    b"POST /work HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n1\r\n0\r\n\r\n"
)


class Held(Example):
    """Its work takes until it is let go, and leaves the event loop free."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = asyncio.Event()

    async def _work(self, call: Any) -> Any:
        await self.let_go.wait()
        return await super()._work(call)


def serve(check: Callable[[Server, Held], Coroutine[Any, Any, None]]) -> None:
    """Run a check against a server with one place to wait."""

    async def served() -> None:
        service = Held()
        settings = ServerSettings(max_waiting=1, max_body_bytes=10_000, deadline_ms=20_000)
        app = build_app(service, settings)
        async with Server(app) as server:
            await asyncio.wait_for(check(server, service), timeout=20)

    uvloop.run(served())


async def fill(server: Server) -> list[Line]:
    """Open connections until one request works and one waits."""
    lines = []
    for _ in range(2):
        lines.append(await server.line())
        await lines[-1].write(post("/work", b"0"))
    while not server.app.admission.waiting:
        await asyncio.sleep(0.001)
    return lines


@pytest.mark.parametrize(
    "request_",
    [
        post("/work", b"1"),
        post("/work?x=1", b"1", "X-Request-Id: mine"),
        post("/work", b"1", "Connection: keep-alive"),
        CHUNKED,
    ],
)
def test_while_it_is_full_work_is_refused_and_the_connection_lives_on(request_: bytes) -> None:
    async def check(server: Server, service: Held) -> None:
        held = await fill(server)
        line = await server.line()
        for _ in range(2):
            response = await line.ask(request_)
            assert (response.status, response.headers["retry-after"]) == (429, "1")
            assert response.json["error"]
            assert "date" in response.headers
        if b"mine" in request_:
            assert response.headers["x-request-id"] == "mine"
        assert (await line.ask(post("/echo", b"still here"))).body == b"still here"
        service.let_go.set()
        assert [(await one.read()).status for one in held] == [200, 200]
        assert (await line.ask(post("/work", b"1"))).status == 200

    serve(check)


def test_a_request_in_pieces_is_refused_too() -> None:
    async def check(server: Server, service: Held) -> None:
        held = await fill(server)
        line = await server.line()
        whole = post("/work", b"12345")
        for piece in (whole[:30], whole[30:-3], whole[-3:]):
            await line.write(piece)
            await asyncio.sleep(0.01)
        assert (await line.read()).status == 429
        assert (await line.ask(post("/echo", b"x"))).status == 200
        service.let_go.set()
        assert [(await one.read()).status for one in held] == [200, 200]

    serve(check)


def test_answers_on_one_connection_keep_their_order_while_it_is_full() -> None:
    async def check(server: Server, service: Held) -> None:
        held = await fill(server)
        await held[0].write(post("/work", b"1"))
        await asyncio.sleep(0.05)
        service.let_go.set()
        assert (await held[0].read()).body == b"0"
        assert (await held[0].read()).status in (200, 429)
        assert (await held[1].read()).body == b"0"

    serve(check)


@pytest.mark.parametrize(
    ("data", "refused"),
    [
        (post("/work", b"1"), True),
        (post("/work?x=1", b"1"), True),
        (post("/work", b"1", "Connection: Keep-Alive"), True),
        (post("/work", b"1").replace(b"Content-Length", b"CONTENT-LENGTH"), True),
        (post("/count", b"{}"), True),
        (post("/echo", b"1"), False),
        (post("/worker", b"1"), False),
        (post("/work", b"1")[:-1], False),
        (post("/work", b"1") + b"P", False),
        (post("/work", b"1") * 2, False),
        (post("/work", b"1", "Connection: close"), False),
        (post("/work", b"1", "Transfer-Encoding: chunked"), False),
        (post("/work", b"1", "Content-Length: 100"), False),
        (post("/work", b"1").partition(b"\r\n\r\n")[0], False),
        (b"POST /work HTTP/1.1\r\nContent-Length: 97\r\n".ljust(100, b"x"), False),
        (post("/work", b"1").replace(b"HTTP/1.1", b"HTTP/1.0"), False),
        (post("/work", b"1").replace(b" HTTP/1.1", b""), False),
        (CHUNKED, False),
        (b"", False),
    ],
)
def test_the_door_refuses_only_what_is_exactly_one_request_for_work(
    data: bytes, refused: bool
) -> None:
    door = Door(build_app(Example(), ServerSettings()))
    for _ in range(2):  # the second from what it remembers
        assert (door.refuse(data, []) is not None) == refused


def test_who_comes_again_at_once_is_held_up_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pushback, "_AT_ONCE", 3)
    monkeypatch.setattr(pushback, "_A_SECOND", 0)
    monkeypatch.setattr(pushback, "_LONGEST_S", 1.0)
    monkeypatch.setattr(pushback, "_SHORTEST_S", 1.0)

    async def check(server: Server, service: Held) -> None:
        await fill(server)
        stubborn, other = await server.line(), await server.line()
        for _ in range(4):
            assert (await stubborn.ask(post("/work", b"1"))).status == 429
        again = asyncio.ensure_future(stubborn.ask(post("/work", b"1")))
        assert (await other.ask(post("/echo", b"x"))).status == 200
        assert (await other.ask(post("/work", b"1"))).status == 429
        assert not again.done()
        assert (await again).status == 429

    serve(check)


def test_a_client_that_left_is_not_worked_for() -> None:
    async def check(server: Server, service: Held) -> None:
        first, second = await fill(server)
        await second.close()
        await asyncio.sleep(0.05)
        service.let_go.set()
        assert (await first.read()).status == 200
        while server.app.in_flight:
            await asyncio.sleep(0.001)
        assert len(service.worked) == 1

    serve(check)


def test_a_slow_body_takes_nobodys_place() -> None:
    async def check(server: Server, service: Held) -> None:
        service.let_go.set()
        slow = [await server.line() for _ in range(5)]
        for line in slow:
            await line.write(post("/work", b"1")[:-1])
        await asyncio.sleep(0.05)
        quick = await server.line()
        assert (await quick.ask(post("/work", b"1"))).status == 200
        for line in slow:
            assert (await line.ask(b"1")).status in (200, 429)

    serve(check)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n12",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"CONNECT here:80 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    ],
)
def test_what_is_not_http_is_400_in_json(data: bytes) -> None:
    async def check(server: Server, service: Held) -> None:
        line = await server.line()
        response = await line.ask(data)
        assert response.status == 400
        assert response.json["error"]
        assert response.headers["connection"] == "close"
        assert await line.ended()

    serve(check)


def test_a_body_too_large_is_413_and_the_connection_lives_on() -> None:
    async def check(server: Server, service: Held) -> None:
        line = await server.line()
        response = await line.ask(post("/echo", b"x" * 3_000_000))
        assert response.status == 413
        assert (await line.ask(post("/echo", b"here"))).body == b"here"

    serve(check)


def test_a_head_without_end_is_431() -> None:
    async def check(server: Server, service: Held) -> None:
        line = await server.line()
        await line.write(b"GET /health/live HTTP/1.1\r\n")
        await line.write(b"X-Long: " + b"x" * 100_000)
        response = await line.read()
        assert (response.status, response.headers["connection"]) == (431, "close")

    serve(check)


@pytest.mark.parametrize("part", [b"GET /hea", post("/echo", b"whole")[:-1]])
def test_a_request_that_does_not_come_is_408(part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_MESSAGE_S", 0.05)

    async def check(server: Server, service: Held) -> None:
        line = await server.line()
        response = await line.ask(part)
        assert (response.status, response.headers["connection"]) == (408, "close")
        assert await line.ended()
        while server.app.in_flight:
            await asyncio.sleep(0.001)

    serve(check)


def test_more_connections_than_fit_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_MAX_CONNECTIONS", 2)

    async def check(server: Server, service: Held) -> None:
        lines = [await server.line() for _ in range(3)]
        response = await lines[2].read()
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        assert await lines[2].ended()
        assert (await lines[0].ask(post("/echo", b"x"))).status == 200
        await lines[1].close()
        await asyncio.sleep(0.05)
        assert (await (await server.line()).ask(post("/echo", b"x"))).status == 200

    serve(check)


@pytest.mark.parametrize("refused", [False, True])
def test_a_silent_connection_is_closed_and_a_refused_one_is_not(
    refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hashtab.serving.http.server.KEEP_ALIVE_S", 0.3)

    async def check(server: Server, service: Held) -> None:
        await fill(server)
        line = await server.line()
        for _ in range(5):
            if refused:
                assert (await line.ask(post("/work", b"1"))).status == 429
            await asyncio.sleep(0.1)
        if refused:
            assert (await line.ask(post("/work", b"1"))).status == 429
        assert await line.ended()
        service.let_go.set()

    serve(check)


def test_a_client_that_offers_http_2_is_answered_in_http_1() -> None:
    async def check(server: Server, service: Held) -> None:
        line = await server.line()
        offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
        for body in (b"here", b"Upgrade: of a body\r\nupgrade: stays", b""):
            assert (await line.ask(post("/echo", body, *offer))).body == body

    serve(check)
