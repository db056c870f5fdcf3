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
def load_behaviours(values, ids, items, row, length, size: tl.constexpr, SIZE: tl.constexpr):
    """Return the tile `[LENGTH, SIZE]` of behaviours before `length`, zeros behind it.

    Args:
        values: `[N, D]`, or with `ids` the table `[V, D]`.
        ids: `[N]` int32 or int64, or None.
        items: V.
        row: `[LENGTH]`, which behaviours.
        length: how many there are.
        size: D.
        SIZE: as `padded_size` returns.
    """
    if ids is None:
        x = load_rows(values, row, length, size, SIZE)
    else:
        x = gather_rows(values, ids, items, row, row < length, size, SIZE)
    return x


@triton.jit
def gather_rows(values, ids, items, row, there, size: tl.constexpr, SIZE: tl.constexpr):
    """Return the tile `[LENGTH, SIZE]` of rows `ids[row]` of the table, zeros where none is there.

    A wrong id counts as 0, which takes fewer registers than the nearest right one.
    """
    item = tl.load(ids + row, mask=there, other=0).to(tl.int64)  # a table may be large
    item = tl.where((item >= 0) & (item < items), item, 0)
    column = tl.arange(0, SIZE)
    address = item[:, None] * size + column[None, :]
    mask = there[:, None] & (column < size)[None, :]
    return tl.load(values + address, mask=mask, other=0.0)


@triton.jit
def store_rows(values, row, length, rows, size: tl.constexpr, SIZE: tl.constexpr):
    """Store a tile `[LENGTH, SIZE]` at the rows before `length`."""
    column = tl.arange(0, SIZE)
    address = row[:, None] * size + column[None, :]
    tl.store(values + address, rows, mask=(row < length)[:, None] & (column < size)[None, :])
