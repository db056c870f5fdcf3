"""Which rows a Triton program handles, found on the device: nothing about users is known outside.

Rows `[N, ...]` are cut into tiles of TILE rows, aligned to the flat row index, and again at every
user. A piece of user u in tile i is numbered `u + i`: no number names two pieces, and
`slots(users, rows, TILE)` programs cover them all.
"""

# Triton's functions take pointers and numbers of the device, which annotations cannot tell apart.
# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

_FAN = tl.constexpr(128)


def slots(users: int, rows: int, tile: int) -> int:
    """Return how many programs cover the pieces of `rows` rows of `users` users."""
    return users + triton.cdiv(rows, tile) if users else 0


@triton.jit
def slot(offsets_ptr, users, slot, TILE: tl.constexpr):
    """Find the piece of number `slot`: its user, its first row and the row behind its last.

    Args:
        offsets_ptr: `[users + 1]` int64.
        users: at least 1.
        slot: number of the piece.
        TILE: rows of a tile.

    Returns:
        User, begin and end, int64. There are no rows where end <= begin. The user lies within
        0 .. users - 1 whatever the offsets hold; begin and end are for the caller to clamp if
        these may be wrong.
    """
    wanted = tl.cast(slot, tl.int64)
    low = tl.full([], 0, tl.int64)
    high = low + users
    while high - low > 1:
        step = (high - low + _FAN - 1) // _FAN
        probes = low + (tl.arange(0, _FAN) + 1) * step
        inside = probes < high
        tiles = tl.load(offsets_ptr + probes, mask=inside, other=0) // TILE
        below = inside & (probes + tiles <= wanted)
        low += tl.sum(below.to(tl.int32), 0) * step
        high = tl.minimum(low + step, high)
    first = (wanted - low) * TILE
    begin = tl.maximum(tl.load(offsets_ptr + low), first)
    end = tl.minimum(tl.load(offsets_ptr + low + 1), first + TILE)
    return low, begin, end


@triton.jit
def span(offsets_ptr, user, rows):
    """Return a user's first row and the row behind its last, within 0 .. rows in any case."""
    begin = tl.maximum(tl.load(offsets_ptr + user), 0)
    end = tl.minimum(tl.load(offsets_ptr + user + 1), rows)
    return begin, tl.maximum(begin, end)
