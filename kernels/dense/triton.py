"""Exact softmax target attention of ragged histories on a GPU, forward and backward.

A program takes a tile of one user's queries and walks over the behaviours that any of them sees;
the gradient of behaviours takes a tile of those and walks over the queries that see any of it.
Tiles in the middle of a walk, which every query sees whole, need no mask. Where users are few,
several programs share a walk and a second kernel merges what they found, in fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashtab.kernels.core import dispatch
from hashtab.kernels.core.tiles import UNSPECIALIZED, slots, span, user_slot
from hashtab.kernels.dense import tiling
from hashtab.kernels.dense.tiling import Backward, Shape, Tiles

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, for -inf - -inf is NaN
_NEVER = tl.constexpr(2**62)  # a cut that none reaches
_CUTS_AT_ONCE = tl.constexpr(512)

_MERGED_ROWS = 4
_ADDED_AT_ONCE = 1024
_LONGEST = 2**31 - 1  # what positions within a history are counted in


def attend_at(
    queries: Tensor,
    query_offsets: Tensor | None,
    cuts: Tensor | None,
    keys: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    scale: float,
    last: int | None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the interest of each query and the log-sum-exp of its scores.

    Args:
        queries: `[Q, D]` float16, bfloat16 or float32, as keys and values.
        query_offsets: `[B + 1]` int64; each user has Q / B queries when None.
        cuts: `[Q]` int64, ascending within a user; None together with `query_offsets`, each query
            then sees the whole history of its user.
        keys: `[N, D]`; the values when None.
        values: `[N, Dv]`.
        offsets: `[B + 1]` int64.
        scale: factor of the scores, above 0.
        last: behaviours a query sees at most, the latest; all when None.
        tiles: how the kernel is cut; chosen from the shapes when None.

    Returns:
        `[Q, Dv]` in the dtype of `values`, and `[Q]` float32; zeros where nothing is seen.
    """
    batch = _Batch(queries, query_offsets, cuts, keys, values, offsets, scale, last)
    interest = values.new_empty(batch.queries, values.shape[1])
    log_sums = values.new_empty(batch.queries, dtype=torch.float32)
    if batch.queries == 0:
        return interest, log_sums
    tiles = tiles or tiling.forward(batch.shape)
    if tiles.splits == 1:
        batch.launch(_interest, tiles, interest_ptr=interest, log_sums_ptr=log_sums)
        return interest, log_sums
    parts = log_sums.new_empty(tiles.splits, *interest.shape)
    part_sums = log_sums.new_empty(tiles.splits, batch.queries)
    batch.launch(_interest, tiles, interest_ptr=parts, log_sums_ptr=part_sums)
    _merge[(triton.cdiv(batch.queries, _MERGED_ROWS),)](
        parts,
        part_sums,
        interest,
        log_sums,
        batch.queries,
        tiles.splits,
        DV=values.shape[1],
        VALUE_WIDTH=tiling.width_of(values.shape[1]),
        ROWS=_MERGED_ROWS,
    )
    return interest, log_sums


def attend_at_backward(
    grad: Tensor,
    interest: Tensor,
    log_sums: Tensor,
    queries: Tensor,
    query_offsets: Tensor | None,
    cuts: Tensor | None,
    keys: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    scale: float,
    last: int | None,
    tiles: Backward | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries `[Q, D]`, keys `[N, D]` and values `[N, Dv]`.

    Args:
        grad: `[Q, Dv]`, of the interest.
        interest: `[Q, Dv]`, from the forward pass.
        log_sums: `[Q]` float32, from the forward pass.
        queries: as in the forward pass, and so on up to `last`.
        query_offsets: see `attend_at`.
        cuts: see `attend_at`.
        keys: see `attend_at`.
        values: see `attend_at`.
        offsets: see `attend_at`.
        scale: see `attend_at`.
        last: see `attend_at`.
        tiles: how the kernels are cut; chosen from the shapes when None.

    Returns:
        Gradients in the dtype of the rows. Without keys that of values has both parts, and that of
        keys is `[0, D]`.
    """
    batch = _Batch(queries, query_offsets, cuts, keys, values, offsets, scale, last)
    grad_queries = queries.new_empty(queries.shape)
    grad_values = values.new_empty(values.shape)
    grad_keys = values.new_empty(0 if keys is None else keys.shape[0], queries.shape[1])
    if batch.users == 0:
        return grad_queries, grad_keys, grad_values
    tiles = tiles or tiling.backward(batch.shape)
    ends: dict[str, Tensor] = {
        "grad_ptr": grad.contiguous(),
        "interest_ptr": interest.contiguous(),
        "log_sums_ptr": log_sums,
        "grad_keys_ptr": grad_keys,
        "grad_values_ptr": grad_values,
    }
    if tiles.together and batch.queries:
        batch.launch_summed(_grads_together, tiles.together, grad_queries, **ends)
        return grad_queries, grad_keys, grad_values
    alongs = log_sums.new_empty(batch.queries)
    if batch.queries:
        batch.launch_summed(
            _grad_of_queries, tiles.queries, grad_queries, **ends, alongs_ptr=alongs
        )
    if values.shape[0]:
        batch.launch(_grad_of_behaviours, tiles.behaviours, **ends, alongs_ptr=alongs)
    return grad_queries, grad_keys, grad_values


class _Batch:
    """The arguments that kernels have in common, by the names they have there."""

    def __init__(
        self,
        queries: Tensor,
        query_offsets: Tensor | None,
        cuts: Tensor | None,
        keys: Tensor | None,
        values: Tensor,
        offsets: Tensor,
        scale: float,
        last: int | None,
    ) -> None:
        self.users = offsets.shape[0] - 1
        self.queries, size = queries.shape
        self.behaviours, value_size = values.shape
        uniform = query_offsets is None or cuts is None
        width, value_width = tiling.width_of(size), tiling.width_of(value_size)
        self.shape = Shape(
            self.users,
            self.queries,
            self.behaviours,
            max(width, value_width),
            values.element_size(),
            keys is None,
            uniform,
            dispatch.before_hopper(values),
        )
        self._values = values.contiguous()
        self._arguments: dict[str, Any] = {
            "queries_ptr": queries.contiguous(),
            "query_offsets_ptr": offsets if query_offsets is None else query_offsets.contiguous(),
            "cuts_ptr": offsets if cuts is None else cuts.contiguous(),
            "keys_ptr": self._values if keys is None else keys.contiguous(),
            "values_ptr": self._values,
            "offsets_ptr": offsets.contiguous(),
            "users": self.users,
            "queries": self.queries,
            "behaviours": self.behaviours,
            "candidates": self.queries // self.users if uniform and self.users else 0,
            "scale": scale,
            "last": 0 if last is None else min(last, _LONGEST),
            "D": size,
            "DV": value_size,
            "WIDTH": width,
            "VALUE_WIDTH": value_width,
            "SHARED": keys is None,
            "UNIFORM": uniform,
            "LAST": last is not None,
            # A single TF32 product is no float32; three of them are nearly one.
            "PRECISION": "tf32x3" if values.dtype == torch.float32 else "tf32",
        }

    def launch(self, kernel: Any, tiles: Tiles, **others: Tensor) -> None:
        """Run a kernel with those of the arguments that it takes."""
        known = self._arguments | others
        known |= {
            "QUERIES": tiles.queries,
            "BEHAVIOURS": tiles.behaviours,
            "SPLITS": tiles.splits,
            "CHUNK": tiles.chunk,
        }
        arguments = {name: known[name] for name in kernel.arg_names}
        kernel[self._grid(kernel, tiles)](
            **arguments, num_warps=tiles.warps, num_stages=tiles.stages
        )

    def launch_summed(
        self, kernel: Any, tiles: Tiles, grad_queries: Tensor, **others: Tensor
    ) -> None:
        """Run a kernel whose splits each find a part of the gradient of queries."""
        if tiles.splits == 1:
            self.launch(kernel, tiles, grad_queries_ptr=grad_queries, **others)
            return
        shape, count = (tiles.splits, *grad_queries.shape), grad_queries.numel()
        parts = grad_queries.new_empty(shape, dtype=torch.float32)
        self.launch(kernel, tiles, grad_queries_ptr=parts, **others)
        _add_up[(triton.cdiv(count, _ADDED_AT_ONCE),)](
            parts, grad_queries, count, tiles.splits, BLOCK=_ADDED_AT_ONCE
        )

    def _grid(self, kernel: Any, tiles: Tiles) -> tuple[int, int]:
        """Return how many programs cover the rows that a kernel takes tiles of, and splits."""
        if kernel is _grad_of_behaviours:
            return slots(self.users, self.behaviours, tiles.behaviours), 1
        if self.shape.uniform:
            return self.users * triton.cdiv(self.queries // self.users, tiles.queries), tiles.splits
        return slots(self.users, self.queries, tiles.queries), tiles.splits


@triton.jit
def _row(rows_ptr, first, SIZE: tl.constexpr):
    """Return a pointer to a row, however many numbers lie before it."""
    return rows_ptr + tl.cast(first, tl.int64) * SIZE


@triton.jit
def _load(
    rows_ptr,
    count,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Load a tile: zeros beyond SIZE columns and, unless it is WHOLE, from row `count` on."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    tile = rows_ptr + row * SIZE + column
    if WHOLE and SIZE == WIDTH:
        x = tl.load(tile)
    elif WHOLE:
        x = tl.load(tile, mask=column < SIZE, other=0.0)
    elif SIZE == WIDTH:
        x = tl.load(tile, mask=row < count, other=0.0)
    else:
        x = tl.load(tile, mask=(row < count) & (column < SIZE), other=0.0)
    return x


@triton.jit
def _store(rows_ptr, count, x, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (row < count) & (column < SIZE)
    tl.store(rows_ptr + row * SIZE + column, x.to(rows_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _products(
    a,
    a_ptr,
    a_count,
    b,
    b_ptr,
    b_count,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the products of all rows of two tiles, `a b^T`.

    Three TF32 products split each number in two, for which there are not registers enough when rows
    are wide: these are read again, in chunks.
    """
    if CHUNK >= WIDTH:
        sums = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        sums = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        a_row, b_row = tl.arange(0, a.shape[0])[:, None], tl.arange(0, b.shape[0])[:, None]
        for start in range(0, WIDTH, CHUNK):
            column = start + tl.arange(0, CHUNK)[None, :]
            a_inside = (a_row < a_count) & (column < SIZE)
            b_inside = (b_row < b_count) & (column < SIZE)
            a_part = tl.load(a_ptr + a_row * SIZE + column, mask=a_inside, other=0.0)
            b_part = tl.load(b_ptr + b_row * SIZE + column, mask=b_inside, other=0.0)
            sums = tl.dot(a_part, tl.trans(b_part), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _own_queries(
    query_offsets_ptr, users, queries, candidates, QUERIES: tl.constexpr, UNIFORM: tl.constexpr
):
    """Return the user, the first row and the number of the queries that are this program's."""
    number = tl.program_id(0)
    if UNIFORM:
        pieces = tl.cdiv(candidates, QUERIES)
        user = (number // pieces).to(tl.int64)
        done = number % pieces * QUERIES
        begin = user * candidates + done
        count = tl.minimum(candidates - done, QUERIES)
    else:
        user, begin, end = user_slot(query_offsets_ptr, users, number, QUERIES)
        begin = tl.maximum(begin, 0)
        count = tl.maximum(tl.minimum(end, queries) - begin, 0).to(tl.int32)
    return user, begin, count


@triton.jit
def _seen(
    cuts_ptr,
    begin,
    count,
    length,
    last,
    QUERIES: tl.constexpr,
    UNIFORM: tl.constexpr,
    LAST: tl.constexpr,
):
    """Return what the queries of a tile see: positions from low up to cut within their user."""
    row = tl.arange(0, QUERIES)
    if UNIFORM:
        cut = tl.where(row < count, length, 0)
    else:
        cut = tl.load(cuts_ptr + begin + row, mask=row < count, other=0)
        cut = tl.minimum(tl.maximum(cut, 0), length).to(tl.int32)
    low = tl.maximum(cut - last, 0) if LAST else tl.zeros_like(cut)
    return low, cut


@triton.jit
def _walk(low, cut, real, length, TILE: tl.constexpr, SPLITS: tl.constexpr):
    """Return where a walk over behaviours begins, needs no mask from and to, and ends.

    Splits share what the queries of a tile see, in whole tiles of behaviours.
    """
    begin = tl.min(tl.where(real, low, length), 0)
    end = tl.maximum(tl.max(cut, 0), begin)
    seen_by_all_from = begin + tl.cdiv(tl.maximum(tl.max(low, 0) - begin, 0), TILE) * TILE
    seen_by_all_to = tl.min(tl.where(real, cut, length), 0)
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - begin, TILE), SPLITS) * TILE
        begin = tl.minimum(begin + tl.program_id(1) * share, end)
        end = tl.minimum(begin + share, end)
    whole_from = tl.minimum(tl.maximum(seen_by_all_from, begin), end)
    whole = tl.maximum(tl.minimum(seen_by_all_to, end) - whole_from, 0) // TILE * TILE
    return begin, whole_from, whole_from + whole, end


@triton.jit
def _watchers(cuts_ptr, count, start, stop, last, QUERIES: tl.constexpr, LAST: tl.constexpr):
    """Return, as `_walk`, the stretch of a user's queries that see any of start .. stop.

    Cuts ascend, so counting those below a bound finds the first that is not.
    """
    begin = tl.full([], 0, tl.int32)
    whole_from = begin
    whole_to = begin
    end = begin
    for at in range(0, count, _CUTS_AT_ONCE):
        row = at + tl.arange(0, _CUTS_AT_ONCE)
        cut = tl.load(cuts_ptr + row, mask=row < count, other=_NEVER)
        begin += tl.sum((cut <= start).to(tl.int32), 0)
        whole_from += tl.sum((cut < stop).to(tl.int32), 0)
        if LAST:
            whole_to += tl.sum((cut <= start + last).to(tl.int32), 0)
            end += tl.sum((cut < stop + last).to(tl.int32), 0)
    if not LAST:
        end += count
        whole_to += count
    whole_from = tl.minimum(begin + tl.cdiv(whole_from - begin, QUERIES) * QUERIES, end)
    if LAST:
        whole_to = whole_from + tl.maximum(whole_to - whole_from, 0) // QUERIES * QUERIES
    return begin, whole_from, whole_to, end


@triton.jit
def _weights(logarithms, PRECISION: tl.constexpr):
    """Return the softmax weights of the backward pass from their logarithms to base 2."""
    # Scores in the millions, added up in another order than in the forward pass, can come out
    # above their log-sum. In lower precision such scores mean nothing, and this costs time.
    if PRECISION == "tf32x3":
        logarithms = tl.minimum(logarithms, 0.0)
    return tl.exp2(logarithms)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _interest(
    interest_ptr,
    log_sums_ptr,
    queries_ptr,
    query_offsets_ptr,
    cuts_ptr,
    keys_ptr,
    values_ptr,
    offsets_ptr,
    users,
    queries,
    behaviours,
    candidates,
    scale,
    last,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    UNIFORM: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    BEHAVIOURS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    user, begin, count = _own_queries(
        query_offsets_ptr, users, queries, candidates, QUERIES, UNIFORM
    )
    if count <= 0:
        return
    first, behind = span(offsets_ptr, user, behaviours)
    length = (behind - first).to(tl.int32)
    q_ptr = _row(queries_ptr, begin, D)
    q = _load(q_ptr, count, QUERIES, D, WIDTH)
    low, cut = _seen(cuts_ptr, begin, count, length, last, QUERIES, UNIFORM, LAST)
    real = tl.arange(0, QUERIES) < count
    start, whole_from, whole_to, stop = _walk(low, cut, real, length, BEHAVIOURS, SPLITS)
    scale *= _LOG2_E
    top = tl.full([QUERIES], _LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    for PART in tl.static_range(0 if LAST else 1, 3):
        at_first = start if PART == 0 else (whole_from if PART == 1 else whole_to)
        at_stop = whole_from if PART == 0 else (whole_to if PART == 1 else stop)
        for at in range(at_first, at_stop, BEHAVIOURS):
            left = length - at
            k_ptr = _row(keys_ptr, first + at, D)
            k = _load(k_ptr, left, BEHAVIOURS, D, WIDTH, PART == 1)
            scores = _products(q, q_ptr, count, k, k_ptr, left, D, WIDTH, CHUNK, PRECISION)
            if PART != 1:
                position = at + tl.arange(0, BEHAVIOURS)
                seen = position[None, :] < cut[:, None]
                if LAST:
                    seen &= position[None, :] >= low[:, None]
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - higher[:, None])
            fade = tl.exp2(top - higher)
            top = higher
            total = total * fade + tl.sum(weights, 1)
            v_ptr = _row(values_ptr, first + at, DV)
            v = k if SHARED else _load(v_ptr, left, BEHAVIOURS, DV, VALUE_WIDTH, PART == 1)
            weights = weights.to(v.dtype)
            sums = tl.dot(weights, v, sums * fade[:, None], input_precision=PRECISION)
    # A query that sees nothing has a total of 0 and sums of zeros.
    divisor = tl.where(total > 0, total, 1.0)
    log_sum = top + tl.log2(divisor)
    if SPLITS > 1:
        log_sum = tl.where(total > 0, log_sum, float("-inf"))
    else:
        log_sum = tl.where(total > 0, log_sum * _LN_2, 0.0)
    begin += tl.program_id(1).to(tl.int64) * queries
    interest_ptr = _row(interest_ptr, begin, DV)
    _store(interest_ptr, count, sums / divisor[:, None], QUERIES, DV, VALUE_WIDTH)
    row = tl.arange(0, QUERIES)
    tl.store(log_sums_ptr + begin + row, log_sum, mask=row < count)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _merge(
    parts_ptr,
    part_sums_ptr,
    interest_ptr,
    log_sums_ptr,
    queries,
    splits,
    DV: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merge the interests of all splits by their shares of the weights; sums are logs to base 2."""
    begin = tl.program_id(0).to(tl.int64) * ROWS
    count = queries - begin
    row = tl.arange(0, ROWS)
    real = row < count
    top = tl.full([ROWS], _LOWEST, tl.float32)
    for part in range(splits):
        at = begin + tl.cast(part, tl.int64) * queries
        top = tl.maximum(top, tl.load(part_sums_ptr + at + row, mask=real, other=0.0))
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for part in range(splits):
        at = begin + tl.cast(part, tl.int64) * queries
        weight = tl.exp2(tl.load(part_sums_ptr + at + row, mask=real, other=0.0) - top)
        total += weight
        part_ptr = _row(parts_ptr, at, DV)
        sums += weight[:, None] * _load(part_ptr, count, ROWS, DV, VALUE_WIDTH)
    divisor = tl.where(total > 0, total, 1.0)
    interest_ptr = _row(interest_ptr, begin, DV)
    _store(interest_ptr, count, sums / divisor[:, None], ROWS, DV, VALUE_WIDTH)
    log_sum = tl.where(total > 0, (top + tl.log2(divisor)) * _LN_2, 0.0)
    tl.store(log_sums_ptr + begin + row, log_sum, mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _grad_of_queries(
    grad_ptr,
    interest_ptr,
    log_sums_ptr,
    alongs_ptr,
    grad_queries_ptr,
    queries_ptr,
    query_offsets_ptr,
    cuts_ptr,
    keys_ptr,
    values_ptr,
    offsets_ptr,
    users,
    queries,
    behaviours,
    candidates,
    scale,
    last,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    UNIFORM: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    BEHAVIOURS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Write gradients of queries, and scale times each interest's part along its gradient."""
    user, begin, count = _own_queries(
        query_offsets_ptr, users, queries, candidates, QUERIES, UNIFORM
    )
    if count <= 0:
        return
    first, behind = span(offsets_ptr, user, behaviours)
    length = (behind - first).to(tl.int32)
    q_ptr = _row(queries_ptr, begin, D)
    q = _load(q_ptr, count, QUERIES, D, WIDTH)
    g_ptr = _row(grad_ptr, begin, DV)
    grad = _load(g_ptr, count, QUERIES, DV, VALUE_WIDTH)
    interest = _load(_row(interest_ptr, begin, DV), count, QUERIES, DV, VALUE_WIDTH)
    row = tl.arange(0, QUERIES)
    real = row < count
    along = tl.sum(grad.to(tl.float32) * interest.to(tl.float32), 1) * scale
    if SPLITS == 1 or tl.program_id(1) == 0:
        tl.store(alongs_ptr + begin + row, along, mask=real)
    log_sum = tl.load(log_sums_ptr + begin + row, mask=real, other=0.0) * _LOG2_E
    low, cut = _seen(cuts_ptr, begin, count, length, last, QUERIES, UNIFORM, LAST)
    start, whole_from, whole_to, stop = _walk(low, cut, real, length, BEHAVIOURS, SPLITS)
    sums = tl.zeros([QUERIES, WIDTH], tl.float32)
    for PART in tl.static_range(0 if LAST else 1, 3):
        at_first = start if PART == 0 else (whole_from if PART == 1 else whole_to)
        at_stop = whole_from if PART == 0 else (whole_to if PART == 1 else stop)
        for at in range(at_first, at_stop, BEHAVIOURS):
            left = length - at
            k_ptr = _row(keys_ptr, first + at, D)
            v_ptr = _row(values_ptr, first + at, DV)
            k = _load(k_ptr, left, BEHAVIOURS, D, WIDTH, PART == 1)
            v = k if SHARED else _load(v_ptr, left, BEHAVIOURS, DV, VALUE_WIDTH, PART == 1)
            scores = _products(q, q_ptr, count, k, k_ptr, left, D, WIDTH, CHUNK, PRECISION)
            gains = _products(grad, g_ptr, count, v, v_ptr, left, DV, VALUE_WIDTH, CHUNK, PRECISION)
            if PART != 1:
                position = at + tl.arange(0, BEHAVIOURS)
                seen = position[None, :] < cut[:, None]
                if LAST:
                    seen &= position[None, :] >= low[:, None]
                scores = tl.where(seen, scores, float("-inf"))
            weights = _weights(scores * (scale * _LOG2_E) - log_sum[:, None], PRECISION)
            slopes = weights * (gains * scale - along[:, None])
            sums = tl.dot(slopes.to(k.dtype), k, sums, input_precision=PRECISION)
    begin += tl.program_id(1).to(tl.int64) * queries
    _store(_row(grad_queries_ptr, begin, D), count, sums, QUERIES, D, WIDTH)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _add_up(parts_ptr, out_ptr, count, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    sums = tl.zeros([BLOCK], tl.float32)
    for part in range(splits):
        sums += tl.load(parts_ptr + tl.cast(part, tl.int64) * count + at, mask=real, other=0.0)
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _grad_of_behaviours(
    grad_ptr,
    log_sums_ptr,
    alongs_ptr,
    grad_keys_ptr,
    grad_values_ptr,
    queries_ptr,
    query_offsets_ptr,
    cuts_ptr,
    keys_ptr,
    values_ptr,
    offsets_ptr,
    users,
    queries,
    behaviours,
    candidates,
    scale,
    last,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    UNIFORM: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    BEHAVIOURS: tl.constexpr,
):
    user, begin, end = user_slot(offsets_ptr, users, tl.program_id(0), BEHAVIOURS)
    begin, end = tl.maximum(begin, 0), tl.minimum(end, behaviours)
    if begin >= end:
        return
    count = end - begin
    k_ptr, v_ptr = _row(keys_ptr, begin, D), _row(values_ptr, begin, DV)
    k = _load(k_ptr, count, BEHAVIOURS, D, WIDTH)
    v = k if SHARED else _load(v_ptr, count, BEHAVIOURS, DV, VALUE_WIDTH)
    place = begin - tl.load(offsets_ptr + user)
    if UNIFORM:
        first = user * candidates
        start, whole_from, whole_to, stop = 0, 0, candidates, candidates
    else:
        first, behind = span(query_offsets_ptr, user, queries)
        start, whole_from, whole_to, stop = _watchers(
            cuts_ptr + first,
            (behind - first).to(tl.int32),
            place,
            place + count,
            last,
            QUERIES,
            LAST,
        )
    position = (place + tl.arange(0, BEHAVIOURS))[:, None]
    grad_keys = tl.zeros([BEHAVIOURS, WIDTH], tl.float32)
    grad_values = tl.zeros([BEHAVIOURS, VALUE_WIDTH], tl.float32)
    for PART in tl.static_range(1 if UNIFORM else 0, 3 if LAST else 2):
        at_first = start if PART == 0 else (whole_from if PART == 1 else whole_to)
        at_stop = whole_from if PART == 0 else (whole_to if PART == 1 else stop)
        for at in range(at_first, at_stop, QUERIES):
            # A row from `stop` on is zeros: its weight is 1 and what it adds is zeros.
            rows = first + at
            left = stop - at
            q_ptr, g_ptr = _row(queries_ptr, rows, D), _row(grad_ptr, rows, DV)
            q = _load(q_ptr, left, QUERIES, D, WIDTH)
            grad = _load(g_ptr, left, QUERIES, DV, VALUE_WIDTH)
            row = tl.arange(0, QUERIES)
            real = row < left
            log_sum = tl.load(log_sums_ptr + rows + row, mask=real, other=0.0) * _LOG2_E
            along = tl.load(alongs_ptr + rows + row, mask=real, other=0.0)
            scores = _products(k, k_ptr, count, q, q_ptr, left, D, WIDTH, CHUNK, PRECISION)
            gains = _products(v, v_ptr, count, grad, g_ptr, left, DV, VALUE_WIDTH, CHUNK, PRECISION)
            if PART != 1:
                cut = tl.load(cuts_ptr + rows + row, mask=real, other=0)[None, :]
                seen = position < cut
                if LAST:
                    seen &= position >= cut - last
                scores = tl.where(seen, scores, float("-inf"))
            weights = _weights(scores * (scale * _LOG2_E) - log_sum[None, :], PRECISION)
            slopes = weights * (gains * scale - along[None, :])
            weights = weights.to(grad.dtype)
            slopes = slopes.to(q.dtype)
            if SHARED:
                grad_values = tl.dot(slopes, q, grad_values, input_precision=PRECISION)
            else:
                grad_keys = tl.dot(slopes, q, grad_keys, input_precision=PRECISION)
            grad_values = tl.dot(weights, grad, grad_values, input_precision=PRECISION)
    _store(_row(grad_values_ptr, begin, DV), count, grad_values, BEHAVIOURS, DV, VALUE_WIDTH)
    if not SHARED:
        _store(_row(grad_keys_ptr, begin, D), count, grad_keys, BEHAVIOURS, D, WIDTH)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _grads_together(
    grad_ptr,
    interest_ptr,
    log_sums_ptr,
    grad_queries_ptr,
    grad_keys_ptr,
    grad_values_ptr,
    queries_ptr,
    keys_ptr,
    values_ptr,
    offsets_ptr,
    queries,
    behaviours,
    candidates,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    BEHAVIOURS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Write all gradients in one walk, where one tile holds all queries of a user."""
    user = tl.program_id(0).to(tl.int64)
    begin = user * candidates
    first, behind = span(offsets_ptr, user, behaviours)
    length = (behind - first).to(tl.int32)
    q_ptr, g_ptr = _row(queries_ptr, begin, D), _row(grad_ptr, begin, DV)
    q = _load(q_ptr, candidates, QUERIES, D, WIDTH)
    grad = _load(g_ptr, candidates, QUERIES, DV, VALUE_WIDTH)
    interest = _load(_row(interest_ptr, begin, DV), candidates, QUERIES, DV, VALUE_WIDTH)
    along = tl.sum(grad.to(tl.float32) * interest.to(tl.float32), 1) * scale
    row = tl.arange(0, QUERIES)
    log_sum = tl.load(log_sums_ptr + begin + row, mask=row < candidates, other=0.0) * _LOG2_E
    share = tl.cdiv(tl.cdiv(length, BEHAVIOURS), SPLITS) * BEHAVIOURS
    start = tl.minimum(tl.program_id(1) * share, length)
    stop = tl.minimum(start + share, length)
    whole_to = start + (stop - start) // BEHAVIOURS * BEHAVIOURS
    sums = tl.zeros([WIDTH, QUERIES], tl.float32)
    for PART in tl.static_range(1, 3):
        at_first = start if PART == 1 else whole_to
        at_stop = whole_to if PART == 1 else stop
        for at in range(at_first, at_stop, BEHAVIOURS):
            left = length - at
            k_ptr, v_ptr = _row(keys_ptr, first + at, D), _row(values_ptr, first + at, DV)
            k = _load(k_ptr, left, BEHAVIOURS, D, WIDTH, PART == 1)
            v = k if SHARED else _load(v_ptr, left, BEHAVIOURS, DV, VALUE_WIDTH, PART == 1)
            scores = _products(k, k_ptr, left, q, q_ptr, candidates, D, WIDTH, CHUNK, PRECISION)
            gains = _products(
                v, v_ptr, left, grad, g_ptr, candidates, DV, VALUE_WIDTH, CHUNK, PRECISION
            )
            if PART != 1:
                scores = tl.where(tl.arange(0, BEHAVIOURS)[:, None] < left, scores, float("-inf"))
            weights = _weights(scores * (scale * _LOG2_E) - log_sum[None, :], PRECISION)
            slopes = (weights * (gains * scale - along[None, :])).to(k.dtype)
            grad_values = tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
            if SHARED:
                grad_values = tl.dot(slopes, q, grad_values, input_precision=PRECISION)
            else:
                grad_keys = tl.dot(slopes, q, input_precision=PRECISION)
                _store(_row(grad_keys_ptr, first + at, D), left, grad_keys, BEHAVIOURS, D, WIDTH)
            out_ptr = _row(grad_values_ptr, first + at, DV)
            _store(out_ptr, left, grad_values, BEHAVIOURS, DV, VALUE_WIDTH)
            sums = tl.dot(tl.trans(k), slopes, sums, input_precision=PRECISION)
    begin += tl.program_id(1).to(tl.int64) * queries
    out_ptr = _row(grad_queries_ptr, begin, D)
    _store(out_ptr, candidates, tl.trans(sums), QUERIES, D, WIDTH)
