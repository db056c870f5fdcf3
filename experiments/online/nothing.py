"""A server that answers a constant, to measure what a client costs."""

import argparse
import asyncio

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class _Constant(asyncio.Protocol):
    """Answers each whole request, one at a time a connection."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._left = 0  # bytes of the request that are still to come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._left > 0:
            self._left -= len(data)
        else:
            head, _, body = data.partition(b"\r\n\r\n")
            after = head.lower().partition(b"content-length:")[2]
            self._left = int(after.partition(b"\r\n")[0] or 0) - len(body)
        if self._left <= 0:
            self._transport.write(self._answer)


async def serve(port: int, size: int) -> None:
    loop, answer = asyncio.get_running_loop(), _HEAD % size + b"0" * size
    server = await loop.create_server(lambda: _Constant(answer), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="bytes of an answer's body")
    options = parser.parse_args()
    asyncio.run(serve(options.port, options.size))
