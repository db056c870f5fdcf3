"""Services to test servers with; a server in a process of its own makes them by name."""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from hashtab.serving.http import Call, Endpoint, HttpError, Reply, Service


class Shop(msgspec.Struct):
    user: int | str
    items: list[Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]]
    context: dict[str, Any] = {}


class Count(msgspec.Struct):
    count: int


class Example(Service):
    """One endpoint of each kind."""

    name = "example"

    def __init__(self) -> None:
        self.reason: str | None = None
        self.stopped = False
        self.worked: list[Any] = []

    def endpoints(self) -> Sequence[Endpoint]:
        def endpoint(method: str, path: str, handle: Any, **more: Any) -> Endpoint:
            return Endpoint(method=method, path=path, handle=handle, summary="tested", **more)

        return [
            endpoint("POST", "/count", self._count, body=Shop, replies=Count, work=True),
            endpoint("POST", "/work", self._work, body=bytes, replies=bytes, work=True),
            endpoint("POST", "/echo", self._echo, body=bytes, replies=bytes),
            endpoint("POST", "/sleep", self._sleep, body=bytes, replies=bytes),
            endpoint("GET", "/users/{user}", self._user),
            endpoint("DELETE", "/users/{user}", self._user, protected=True, errors=[409]),
            endpoint("GET", "/process", self._process),
            endpoint("POST", "/fail", self._fail, body=bytes),
        ]

    async def start(self) -> None:
        await asyncio.sleep(0)

    async def stop(self) -> None:
        self.stopped = True

    def not_ready(self) -> str | None:
        return self.reason

    async def _count(self, call: Call) -> Reply:
        return Reply(Count(len(call.body.items)))

    async def _work(self, call: Call) -> Reply:
        """Take the processor for as many milliseconds as the body says."""
        self.worked.append(call.request_id)
        until = time.perf_counter() + float(call.body) / 1000
        while time.perf_counter() < until:
            pass
        return Reply(call.body, media_type="text/plain")

    async def _echo(self, call: Call) -> Reply:
        return Reply(call.body, media_type="application/octet-stream")

    async def _sleep(self, call: Call) -> Reply:
        """Wait for as many milliseconds as the body says, and leave the processor to others."""
        await asyncio.sleep(float(call.body) / 1000)
        return Reply(call.body, media_type="text/plain")

    async def _user(self, call: Call) -> Reply:
        said = call.header("X-Said")
        if said == "conflict":
            raise HttpError(409, "twice", "user")
        return Reply({"user": call.path["user"], "query": call.query, "said": said})

    async def _process(self, _: Call) -> Reply:
        return Reply(os.getpid())

    async def _fail(self, call: Call) -> Reply:
        if call.body == b"unencodable":
            return Reply(object())
        raise ValueError("the secret")


def create() -> Service:
    return Example()


class Slow(Example):
    """Takes long to start."""

    async def start(self) -> None:
        logging.getLogger(__name__).info("starting")
        await asyncio.sleep(60)


def create_slow() -> Service:
    return Slow()


class Broken(Example):
    """Cannot start."""

    async def start(self) -> None:
        raise ValueError("no bundle at /nowhere")


def create_broken() -> Service:
    return Broken()
