"""Ends listening so that no connection is reset that its client believes in."""

import asyncio
import socket

import pytest

from hashtab.serving.http.closing import take_all, turn_away


class Greeting(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"hello")
        transport.close()


def test_a_connection_from_before_is_served_and_none_begins_after() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = listener.getsockname()
        early = [socket.create_connection(address) for _ in range(5)]
        turn_away(listener)
        with pytest.raises(TimeoutError):
            socket.create_connection(address, timeout=0.3)

        async def take() -> None:
            await take_all(listener, Greeting)
            await asyncio.sleep(0)

        asyncio.run(take())
    for client in early:
        with client:
            assert client.recv(10) == b"hello"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
