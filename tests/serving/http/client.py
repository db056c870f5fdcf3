"""Sends requests to an ASGI application in this process, as a server would."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import unquote

from starlette.types import ASGIApp, Message

Request = tuple[str, str, bytes, Mapping[str, str]]  # method, target, body, headers


@dataclass(frozen=True)
class Response:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Starts the application's service when entered, and stops it when left."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        self._runner.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._stop())
        self._runner.close()

    def request(
        self,
        method: str,
        target: str,
        body: bytes | Iterable[bytes] = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send one request; a body of several pieces goes without Content-Length, as if chunked."""
        return self._runner.run(self.send(method, target, body, headers))

    def wait(self, seconds: float) -> None:
        """Let the service's tasks go on for so long."""
        self._runner.run(asyncio.sleep(seconds))

    def get(self, target: str, **headers: str) -> Response:
        return self.request("GET", target, headers=headers)

    def post(self, target: str, content: Any) -> Response:
        """Send JSON."""
        body = json.dumps(content).encode()
        return self.request("POST", target, body, {"Content-Type": "application/json"})

    def together(self, *requests: Request) -> list[Response]:
        """Send several at once; the answers are in the order of the requests."""

        async def all_of_them() -> list[Response]:
            return await asyncio.gather(*(self.send(*request) for request in requests))

        return self._runner.run(all_of_them())

    async def send(
        self,
        method: str,
        target: str,
        body: bytes | Iterable[bytes] = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        raw_path, _, query = target.partition("?")
        given = dict(headers or {})
        pieces = [body] if isinstance(body, bytes) else list(body)
        if isinstance(body, bytes) and body:
            given.setdefault("Content-Length", str(len(body)))
        scope = {
            "type": "http",
            "method": method,
            "path": unquote(raw_path, errors="replace"),
            "raw_path": raw_path.encode(),
            "query_string": query.encode(),
            "headers": [(n.lower().encode(), v.encode("latin-1")) for n, v in given.items()],
            "state": {},
        }
        sent: list[Message] = []
        pending = [
            {"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces)}
            for i, piece in enumerate(pieces)
        ]

        async def receive() -> Message:
            return pending.pop(0) if pending else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start, *rest = sent
        return Response(
            start["status"],
            {n.decode(): v.decode("latin-1") for n, v in start["headers"]},
            b"".join(message["body"] for message in rest),
        )

    async def _start(self) -> None:
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue()
        lifespan = self.app({"type": "lifespan"}, self._to_app.get, self._from_app.put)
        self._lifespan = asyncio.ensure_future(lifespan)
        await self._tell("startup")

    async def _stop(self) -> None:
        await self._tell("shutdown")
        await self._lifespan

    async def _tell(self, what: str) -> None:
        await self._to_app.put({"type": f"lifespan.{what}"})
        answer = await self._from_app.get()
        if answer["type"] != f"lifespan.{what}.complete":
            await self._lifespan  # raises what went wrong
