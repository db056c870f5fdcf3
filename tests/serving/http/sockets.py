"""Talks to a server through sockets: whole requests, and bytes as they come."""

import asyncio
import contextlib
from typing import Self

from uvicorn.server import ServerState

from hashtab.serving.http.app import App
from hashtab.serving.http.protocol import Connection
from hashtab.serving.http.server import config_of
from tests.serving.http.client import Response


class Line:
    """One connection; several requests may go through it, one after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def to(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def read(self) -> Response:
        """Read one answer; EOFError if the server closed the connection instead."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in lines)}
        body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        return Response(int(first.split()[1]), headers, body)

    async def ask(self, data: bytes) -> Response:
        await self.write(data)
        return await self.read()

    async def ended(self) -> bool:
        """Wait until the server closes the connection."""
        return await self._reader.read() == b""

    async def close(self) -> None:
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def post(path: str, body: bytes = b"", *lines: str) -> bytes:
    """Return a request with more header lines."""
    head = "".join(f"{line}\r\n" for line in (f"Content-Length: {len(body)}", *lines))
    return f"POST {path} HTTP/1.1\r\nHost: here\r\n{head}\r\n".encode() + body


class Server:
    """A server in this process, and the connections to it."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._config = config_of(app)
        self._state = ServerState()
        self._state.default_headers = [(b"date", b"today")]
        self._lines: list[Line] = []

    async def __aenter__(self) -> Self:
        await self.app.lifecycle.start()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self._config, self._state, {}), "127.0.0.1", 0
        )
        return self

    async def line(self) -> Line:
        port = self._server.sockets[0].getsockname()[1]
        self._lines.append(await Line.to(port))
        return self._lines[-1]

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for line in self._lines:
            await line.close()
        for task in list(self._state.tasks):
            task.cancel()
        while self._state.connections or self._state.tasks:
            await asyncio.sleep(0.01)
