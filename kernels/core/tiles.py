"""Which rows a Triton program handles, found on the device: nothing about users is known outside.

Each user's rows are cut into pieces of TILE rows, from its first one on: a piece is the same
whoever else is in the batch. Piece i of user u, whose first row is f, has the number
`u + f // TILE + i`: none names two pieces, and `slots(users, rows, TILE)` programs cover them all.
"""

import triton
import triton.language as tl

# What each batch has its own number of, whatever a kernel calls it. Triton would make a kernel anew
# for multiples of 16 and for 1, seconds into a training; and of a single user, were it a constant,
# Triton 3.6 cannot compile the search below.
UNSPECIALIZED = [
    *("users", "rows", "items", "queries", "behaviours", "candidates", "count"),
    *("share", "last", "skipped", "splits"),
]
_FAN = tl.constexpr(128)


def slots(users: int, rows: int, tile: int) -> int:
    """Return how many programs cover the pieces of `rows` rows of `users` users."""
    return users + triton.cdiv(rows, tile) if users else 0


@triton.jit
def user_slot(offsets_ptr, users, slot, TILE: tl.constexpr):
    """Find the piece of number `slot`: its user, its first row and the row behind its last.

    Args:
        offsets_ptr: `[users + 1]` int64.
        users: at least 1.
        slot: number of the piece.
        TILE: rows of a piece.

    Returns:
        User, begin and end, int64. There are no rows where end <= begin. The user lies within
        0 .. users - 1 whatever the offsets hold; begin and end are for the caller to clamp if
        these may be wrong.
    """
    user = _owner(offsets_ptr, users, slot, TILE)
    first = tl.load(offsets_ptr + user)
    begin = first + (slot - user - first // TILE) * TILE
    end = tl.minimum(tl.load(offsets_ptr + user + 1), begin + TILE)
    return user, begin, end


@triton.jit
def _owner(offsets_ptr, users, slot, TILE: tl.constexpr):
    """Return the last user whose first piece has no number above `slot`."""
    low = tl.full([], 0, tl.int64)
    high = low + users
    while high - low > 1:
        step = (high - low + _FAN - 1) // _FAN
        probes = low + (tl.arange(0, _FAN) + 1) * step
        inside = probes < high
        tiles = tl.load(offsets_ptr + probes, mask=inside, other=0) // TILE
        below = inside & (probes + tiles <= slot)
        low += tl.sum(below.to(tl.int32), 0) * step
        high = tl.minimum(low + step, high)
    return low


@triton.jit
def span(offsets_ptr, user, rows):
    """Return a user's first row and the row behind its last, within 0 .. rows in any case."""
    begin = tl.maximum(tl.load(offsets_ptr + user), 0)
    end = tl.minimum(tl.load(offsets_ptr + user + 1), rows)
    return begin, tl.maximum(begin, end)


@triton.jit
def first_above(sorted_values, begin, end, bound):
    """Return the first index within begin .. end whose value is above `bound`, by halving."""
    while begin < end:
        middle = (begin + end) // 2
        above = tl.load(sorted_values + middle) > bound
        end = tl.where(above, middle, end)
        begin = tl.where(above, begin, middle + 1)
    return begin
