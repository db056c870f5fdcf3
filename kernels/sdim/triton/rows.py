"""Tiles of rows in memory, whose width is that of vectors rounded up to a power of two."""

import triton
import triton.language as tl


def padded_size(size: int) -> int:
    """Return the width of tiles for vectors of `size`: a power of two that a product can take."""
    return max(16, int(triton.next_power_of_2(size)))


@triton.jit
def load_rows(values, row, length, size: tl.constexpr, SIZE: tl.constexpr):
    """Return the tile `[LENGTH, SIZE]` of rows before `length`, zeros behind it."""
    column = tl.arange(0, SIZE)
    address = row[:, None] * size + column[None, :]
    if size == SIZE:
        return tl.load(values + address, mask=(row < length)[:, None], other=0.0)
    mask = (row < length)[:, None] & (column < size)[None, :]
    return tl.load(values + address, mask=mask, other=0.0)


@triton.jit
def store_rows(values, row, length, rows, size: tl.constexpr, SIZE: tl.constexpr):
    """Store a tile `[LENGTH, SIZE]` at the rows before `length`."""
    column = tl.arange(0, SIZE)
    address = row[:, None] * size + column[None, :]
    tl.store(values + address, rows, mask=(row < length)[:, None] & (column < size)[None, :])
