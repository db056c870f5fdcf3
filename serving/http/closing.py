"""Ends listening without breaking a connection that a client believes it has.

The kernel completes handshakes for a listening socket by itself, and resets whatever nobody took
when the socket closes. So handshakes have to end first.
"""

import asyncio
import contextlib
import ctypes
import socket
import struct
from collections.abc import Callable

SETTLE_S = 0.2  # in which handshakes end that began before `turn_away`
_SO_ATTACH_FILTER = 26  # of Linux; the module `socket` does not name it
_FLAGS, _SYN = 13, 2  # where they are in a TCP header, and the one that begins a handshake
# As (code, jump if true, jump if false, operand), of <linux/filter.h>.
_DROP_SYN = [(0x30, 0, 0, _FLAGS), (0x45, 0, 1, _SYN), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]


def turn_away(listener: socket.socket) -> None:
    """Let no further handshake begin; who tries is refused once the socket is closed.

    Elsewhere than on Linux it does nothing, and a connection that comes in the last moment may be
    reset.
    """
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in _DROP_SYN)
    held = ctypes.create_string_buffer(program)
    option = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(held))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)


async def take_all(listener: socket.socket, make: Callable[[], asyncio.Protocol]) -> None:
    """Take the connections that are complete and that nobody has taken.

    Args:
        listener: a listening socket that does not block.
        make: the protocol of a connection.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        await loop.connect_accepted_socket(make, connection)
