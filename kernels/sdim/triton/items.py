"""Gradients of behaviours to the gradient of the table that they are rows of, without atomics.

Behaviours are sorted by item, those of an item in their own order. A short run of one item is
summed by a program that takes several items at once; a long one is cut into pieces of a fixed
number of rows from its begin on, whose sums are added in order. So an item's gradient has the same
bits at each run, whichever other items are met.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashtab.kernels.core.tiles import UNSPECIALIZED, span
from hashtab.kernels.sdim.triton.rows import padded_size
from hashtab.kernels.sdim.triton.sums import partial_of, partial_sums, sum_of_pieces

TILE = 128  # rows of a piece, and of a short run at most
_ENTRIES = 4096  # of gradients that a program holds at once


@triton.jit
def _sum_rows(
    grads,
    order,
    begin,
    length,
    size: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return `[RUNS, SIZE]` float32, the sums of runs of rows that `order` names, ROWS at once.

    Args:
        grads: `[N, D]`.
        order: `[N]` int64, rows of `grads`.
        begin: `[RUNS]`, where in `order` runs begin.
        length: `[RUNS]`, how many rows they have.
        size: D.
        SIZE: as `padded_size` returns.
        ROWS: how many rows of each run are loaded together.
    """
    column = tl.arange(0, SIZE)
    total = tl.zeros([begin.shape[0], SIZE], tl.float32)
    for start in range(0, tl.max(length, 0), ROWS):
        step = start + tl.arange(0, ROWS)
        there = step[None, :] < length[:, None]
        row = tl.load(order + begin[:, None] + step[None, :], mask=there, other=0)
        mask = there[:, :, None] & (column < size)[None, None, :]
        address = row[:, :, None] * size + column[None, None, :]
        total += tl.sum(tl.load(grads + address, mask=mask, other=0.0).to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sum_short_runs(
    grads,
    order,
    bounds,
    out,
    items,
    size: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Store the sums of items met TILE times at most, zeros for one that nobody met."""
    item = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    inside = item < items
    begin = tl.load(bounds + item, mask=inside, other=0)
    length = tl.load(bounds + item + 1, mask=inside, other=0) - begin
    short = inside & (length <= TILE)
    length = tl.where(short, length, 0).to(tl.int32)
    total = _sum_rows(grads, order, begin, length, size, SIZE, ROWS)
    column = tl.arange(0, SIZE)
    mask = short[:, None] & (column < size)[None, :]
    tl.store(out + item[:, None] * size + column[None, :], total, mask=mask)


@triton.jit
def _long_piece(ids, bounds, rows, TILE: tl.constexpr):
    """Return item, begin and end of this program's piece of a long run, and the run's first row.

    At most two pieces of long runs begin in a tile of TILE sorted rows, for the pieces of a run are
    as far apart: one of the run that holds the tile's first row, one of that which holds its last.
    There is nothing to do where begin >= end.
    """
    tile = tl.program_id(0).to(tl.int64) * TILE
    behind_tile = tl.minimum(tile + TILE, rows)
    item = tl.load(ids + tile).to(tl.int64)
    last_item = tl.load(ids + behind_tile - 1).to(tl.int64)
    missing = (tl.program_id(1) == 1) & (item == last_item)
    item = tl.where(tl.program_id(1) == 1, last_item, item)
    first, behind = span(bounds, item, rows)
    begin = first + (tl.maximum(tile - first, 0) + TILE - 1) // TILE * TILE
    end = tl.minimum(begin + TILE, behind)
    missing |= (behind - first <= TILE) | (begin >= behind_tile)
    return item, begin, tl.where(missing, begin, end), first


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sum_pieces(
    grads,
    order,
    ids,
    bounds,
    partial,
    rows,
    size: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Store the sum of a piece of a long run where `partial_of` says."""
    item, begin, end, first = _long_piece(ids, bounds, rows, TILE)
    if begin >= end:
        return
    one, column = tl.arange(0, 1), tl.arange(0, SIZE)
    length = (end - begin + one).to(tl.int32)
    total = _sum_rows(grads, order, begin + one, length, size, SIZE, ROWS)
    target = partial + partial_of(bounds, item, rows, (begin - first) // TILE, TILE) * size
    tl.store(target + one[:, None] + column[None, :], total, mask=(column < size)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _add_pieces(
    ids,
    bounds,
    partial,
    out,
    rows,
    size: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Add the pieces of a long run: the program of its first does."""
    item, begin, end, first = _long_piece(ids, bounds, rows, TILE)
    if (begin >= end) | (begin > first):
        return
    _, behind = span(bounds, item, rows)
    pieces = (behind - first + TILE - 1) // TILE
    column = tl.arange(0, SIZE)
    inside = column < size
    total = sum_of_pieces(partial, bounds, item, rows, size, column, inside, pieces, TILE, AT_ONCE)
    tl.store(out + item * size + column, total, mask=inside)


def sum_by_item(grads: Tensor, ids: Tensor, items: int) -> Tensor:
    """Return for each item the sum of the gradients of the behaviours that are its rows.

    Args:
        grads: `[N, D]`, of behaviours.
        ids: `[N]` int32 or int64, the item of each; a wrong id counts as 0.
        items: V.

    Returns:
        `[V, D]` in the dtype of `grads`, summed in float32; zeros for an item that nobody met.
    """
    (rows, size), grads = grads.shape, grads.contiguous()
    out = grads.new_empty(items, size)
    if rows == 0 or out.numel() == 0:
        return out.zero_()
    narrow = torch.int32 if items < 2**31 else torch.int64  # sorts in half the time
    ids = ids.long()
    right = ids.masked_fill((ids < 0) | (ids >= items), 0)
    found, order = right.to(narrow).sort(stable=True)
    every = torch.arange(items + 1, dtype=narrow, device=ids.device)
    bounds = torch.searchsorted(found, every)
    width = padded_size(size)
    at_once = _ENTRIES // width
    runs = max(1, at_once // 8)
    _sum_short_runs[(triton.cdiv(items, runs),)](
        grads, order, bounds, out, items, size,
        SIZE=width, TILE=TILE, RUNS=runs, ROWS=8, num_warps=4,
    )  # fmt: skip
    partial = partial_sums(rows, TILE, size, grads)
    grid = (triton.cdiv(rows, TILE), 2)
    _sum_pieces[grid](
        grads, order, found, bounds, partial, rows, size,
        SIZE=width, TILE=TILE, ROWS=at_once, num_warps=4,
    )  # fmt: skip
    _add_pieces[grid](
        found, bounds, partial, out, rows, size,
        SIZE=width, TILE=TILE, AT_ONCE=at_once, num_warps=4,
    )  # fmt: skip
    return out
