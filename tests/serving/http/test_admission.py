"""Calls that take the processor: in order, one at a time, refused early, and never for nothing."""

import asyncio
import socket
import time

import pytest
import uvloop

from hashtab.serving.http.admission import Admission, DeadlineError
from hashtab.serving.http.deadlines import timeout_s
from tests.serving.http.client import Client, Request
from tests.serving.http.services import Example


def test_work_is_done_in_the_order_of_arrival(client: Client, service: Example) -> None:
    names = ["a", "b", "c", "d"]
    client.together(*(("POST", "/work", b"1", {"X-Request-Id": name}) for name in names))
    assert service.worked == names


def test_more_than_may_wait_are_refused(client: Client, service: Example) -> None:
    responses = client.together(*[("POST", "/work", b"1", {})] * 10)
    assert [response.status for response in responses] == [200] * 4 + [429] * 6
    assert len(service.worked) == 4
    assert responses[-1].headers["retry-after"] == "1"
    assert client.request("POST", "/work", b"1").status == 200


def test_what_cannot_wait_is_not_decoded_first(client: Client) -> None:
    *_, last = client.together(*[("POST", "/work", b"1", {})] * 4, ("POST", "/count", b"{", {}))
    assert last.status == 429


def test_other_calls_do_not_wait_for_work(client: Client) -> None:
    works: list[Request] = [("POST", "/work", b"1", {})] * 9
    *_, other = client.together(*works, ("POST", "/echo", b"here", {}))
    assert (other.status, other.body) == (200, b"here")


def test_a_call_whose_deadline_passes_is_never_worked_on(client: Client, service: Example) -> None:
    *before, late = client.together(
        ("POST", "/work", b"1", {"X-Request-Id": "a"}),
        ("POST", "/work", b"50", {"X-Request-Id": "b"}),
        ("POST", "/work", b"1", {"X-Request-Id": "c", "Request-Timeout-Ms": "20"}),
    )
    assert [response.status for response in before] == [200, 200]
    assert late.status == 503
    assert "deadline" in late.json["error"]
    assert late.headers["retry-after"] == "1"
    assert service.worked == ["a", "b"]


@pytest.mark.parametrize(("asked", "given_s"), [(b"500", 0.5), (b"1e300", 2.0), (b"inf", 2.0)])
def test_a_request_may_ask_for_less_time_than_the_server_gives(
    asked: bytes, given_s: float
) -> None:
    assert timeout_s({b"request-timeout-ms": asked}, 2000.0) == given_s
    assert timeout_s({}, 2000.0) == 2.0


def test_a_deadline_is_told_when_it_passes_and_not_later() -> None:
    async def check() -> None:
        admission = Admission(max_waiting=3)
        await admission.take_turn(time.monotonic() + 10)
        with pytest.raises(DeadlineError):
            await asyncio.wait_for(admission.take_turn(time.monotonic() + 0.01), timeout=5)
        assert admission.waiting == 0

    asyncio.run(check())


def test_sockets_are_polled_between_two_works() -> None:
    seen: list[str] = []

    async def work(admission: Admission, come: socket.socket) -> None:
        await admission.take_turn(time.monotonic() + 10)
        seen.append("work")
        come.send(b"x")
        admission.leave()

    async def check() -> None:
        here, there = socket.socketpair()
        with here, there:

            def polled() -> None:
                here.recv(100)
                seen.append("poll")

            asyncio.get_running_loop().add_reader(here, polled)
            admission = Admission(max_waiting=10)
            await asyncio.gather(*(work(admission, there) for _ in range(3)))
            asyncio.get_running_loop().remove_reader(here)

    uvloop.run(check())  # the servers' loop
    assert seen[:5] == ["work", "poll", "work", "poll", "work"]


@pytest.mark.parametrize("when", ["waiting", "at its turn"])
def test_a_cancelled_call_does_not_keep_the_turn(when: str) -> None:
    async def check() -> None:
        admission = Admission(max_waiting=3)
        later = time.monotonic() + 10
        await admission.take_turn(later)
        cancelled = asyncio.ensure_future(admission.take_turn(later))
        await asyncio.sleep(0)
        if when == "at its turn":
            admission.leave()
        cancelled.cancel()
        await asyncio.wait([cancelled])
        if when == "waiting":
            admission.leave()
        assert admission.waiting == 0
        await asyncio.wait_for(admission.take_turn(later), timeout=5)

    asyncio.run(check())
