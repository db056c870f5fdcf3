"""Queries at cuts by pairs: each query's buckets are sums over the behaviours it sees, by masks.

Time grows with queries times behaviours, as exact attention's does, but for any number of buckets;
`walk.py` is for tables that fit into a program. A program takes some queries of a user.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashtab.kernels.core import dispatch
from hashtab.kernels.core.tiles import UNSPECIALIZED, first_above, slots, span, user_slot
from hashtab.kernels.core.tuning import LaunchShape, launch_shape
from hashtab.kernels.sdim.packing import Packing
from hashtab.kernels.sdim.triton.hashing import load_codes, load_wanted
from hashtab.kernels.sdim.triton.rows import (
    load_behaviours,
    load_rows,
    padded_size,
    store_rows,
)
from hashtab.kernels.sdim.triton.sums import (
    add_products,
    collect,
    columns_at_once,
    inverse_norm,
    parts,
)


@triton.jit
def _load_sight(cuts, query, there, length, last):
    """Return from where up to where queries see a history of `length`, int64."""
    cut = tl.load(cuts + query, mask=there, other=0)
    cut = tl.minimum(tl.maximum(cut, 0), length)
    return tl.maximum(cut - last, 0), cut


@triton.jit
def _members(
    codes,
    wanted,
    row,
    begin,
    end,
    LENGTH: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return `[LENGTH, QUERIES * GROUPS]`, whether a query sees a behaviour in its bucket."""
    seen = (row[:, None] >= begin[None, :]) & (row[:, None] < end[None, :])
    shared = (codes[:, None, :] == wanted[None, :, :]) & seen[:, :, None]
    return tl.reshape(shared, [LENGTH, QUERIES * GROUPS])


@triton.jit
def _sums_of_queries(
    values,
    ids,
    items,
    packed,
    wanted,
    begin,
    end,
    there,
    size: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    TAU: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    LENGTH: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return `[SIZE, QUERIES * GROUPS]`: each query's buckets, of one user's behaviours."""
    high = tl.max(end, 0)
    low = tl.minimum(tl.min(tl.where(there, begin, high), 0), high)
    if ids is None:
        values += low * size
    else:
        ids += low
    packed += low * WORDS
    length = tl.cast(high - low, tl.int32)
    begin, end = (begin - low).to(tl.int32), (end - low).to(tl.int32)
    sums_t = tl.zeros([SIZE, QUERIES * GROUPS], tl.float32)
    for start in tl.range(0, length, LENGTH, num_stages=STAGES):
        row = start + tl.arange(0, LENGTH)
        far = row.to(tl.int64)  # a history may have more numbers than an int32 counts
        x = load_behaviours(values, ids, items, far, length, size, SIZE)
        codes = load_codes(packed, far, row < length, GROUPS, BITS, TAU, WORDS, LENGTH)
        member = _members(codes, wanted, row, begin, end, LENGTH, QUERIES, GROUPS)
        sums_t = add_products(sums_t, x, member, PARTS)
    return sums_t


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _queries(
    values,
    ids,
    items,
    offsets,
    packed,
    query_packed,
    query_offsets,
    cuts,
    interest,
    grad,
    grad_sums,
    users,
    rows,
    queries,
    last,
    size: tl.constexpr,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    LENGTH: tl.constexpr,
    BACKWARD: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store the queries' interests, or with BACKWARD the gradients of their buckets' sums."""
    user, query_begin, query_end = user_slot(query_offsets, users, tl.program_id(0), QUERIES)
    first_query, behind_query = span(query_offsets, user, queries)
    query_begin = tl.maximum(query_begin, first_query)
    query_end = tl.minimum(query_end, behind_query)
    if query_begin >= query_end:
        return
    query = query_begin + tl.arange(0, QUERIES)
    there = query < query_end
    first, behind = span(offsets, user, rows)
    begin, end = _load_sight(cuts, query, there, behind - first, last)
    wanted = load_wanted(query_packed, query, there, groups, GROUPS, BITS, TAU, WORDS, QUERIES)
    if ids is None:
        values += first * size
    else:
        ids += first
    sums_t = _sums_of_queries(
        values, ids, items, packed + first * WORDS, wanted, begin, end, there, size, GROUPS, BITS,
        TAU, WORDS, SIZE, QUERIES, LENGTH, PARTS, STAGES,
    )  # fmt: skip
    scale = inverse_norm(tl.sum(sums_t * sums_t, 0))
    column = tl.arange(0, SIZE)
    mask = there[None, :] & (column < size)[:, None]
    address = query[None, :] * size + column[:, None]
    if not BACKWARD:
        unit_t = sums_t * (scale / groups)[None, :]
        mean = tl.sum(tl.reshape(unit_t, [SIZE, QUERIES, GROUPS]), 2)
        tl.store(interest + address, mean, mask=mask)
    else:
        upstream = tl.load(grad + address, mask=mask, other=0.0).to(tl.float32)
        spread = tl.broadcast_to(upstream[:, :, None], [SIZE, QUERIES, GROUPS])
        upstream_t = tl.reshape(spread, [SIZE, QUERIES * GROUPS])
        unit_t = sums_t * scale[None, :]
        along = tl.sum(unit_t * upstream_t, 0)
        found = (upstream_t - unit_t * along[None, :]) * (scale / groups)[None, :]
        line = query_begin * GROUPS + tl.arange(0, QUERIES * GROUPS)
        inside = (line < query_end * GROUPS)[None, :] & (column < size)[:, None]
        tl.store(grad_sums + line[None, :] * size + column[:, None], found, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _behaviours(
    offsets,
    packed,
    query_packed,
    query_offsets,
    cuts,
    grad_sums,
    grad_values,
    users,
    rows,
    queries,
    last,
    size: tl.constexpr,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    LENGTH: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Collect for each behaviour the gradients of the buckets it lies in of queries that see it."""
    user, row_begin, row_end = user_slot(offsets, users, tl.program_id(0), LENGTH)
    first, behind = span(offsets, user, rows)
    row_begin = tl.maximum(row_begin, first)
    row_end = tl.minimum(row_end, behind)
    if row_begin >= row_end:
        return
    row = row_begin + tl.arange(0, LENGTH)
    codes = load_codes(packed, row, row < row_end, GROUPS, BITS, TAU, WORDS, LENGTH)
    position = (row - first).to(tl.int32)
    first_query, behind_query = span(query_offsets, user, queries)
    begin = first_above(cuts, first_query, behind_query, row_begin - first)
    behind_query = first_above(cuts, begin, behind_query, row_end - first - 1 + last)
    found = tl.zeros([LENGTH, SIZE], tl.float32)
    for start in tl.range(begin, behind_query, QUERIES, num_stages=STAGES):
        query = start + tl.arange(0, QUERIES)
        there = query < behind_query
        sight_begin, sight_end = _load_sight(cuts, query, there, behind - first, last)
        wanted = load_wanted(query_packed, query, there, groups, GROUPS, BITS, TAU, WORDS, QUERIES)
        member = _members(
            codes, wanted, position, sight_begin.to(tl.int32), sight_end.to(tl.int32), LENGTH,
            QUERIES, GROUPS,
        )  # fmt: skip
        line = tl.arange(0, QUERIES * GROUPS)
        length = tl.cast((behind_query - start) * GROUPS, tl.int32)
        sums = load_rows(grad_sums + start * GROUPS * size, line, length, size, SIZE)
        found += collect(member, sums, PARTS)
    store_rows(
        grad_values + row_begin * size,
        tl.arange(0, LENGTH),
        tl.cast(row_end - row_begin, tl.int32),
        found,
        size,
        SIZE,
    )


def attend_at(
    values: Tensor,
    offsets: Tensor,
    packed: Tensor,
    query_packed: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    packing: Packing,
    last: int,
    ids: Tensor | None = None,
) -> Tensor:
    """Return the interests `[Q, D]` in the dtype of the values."""
    interest = values.new_empty(cuts.shape[0], values.shape[1])
    _launch_queries(
        values, ids, offsets, packed, query_packed, query_offsets, cuts, packing, last, interest
    )
    return interest


def attend_at_backward(
    grad: Tensor,
    values: Tensor,
    offsets: Tensor,
    packed: Tensor,
    query_packed: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    packing: Packing,
    last: int,
    ids: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the behaviours `[N, D]` in their dtype."""
    rows, size = packed.shape[0], values.shape[1]
    queries, users = cuts.shape[0], offsets.shape[0] - 1
    out = values.new_empty(rows, size)
    if out.numel() == 0:
        return out
    if queries == 0:
        return out.zero_()
    grad_sums = values.new_empty(queries, packing.padded_groups, size, dtype=torch.float32)
    _launch_queries(
        values, ids, offsets, packed, query_packed, query_offsets, cuts, packing, last, out, grad,
        grad_sums,
    )  # fmt: skip
    code = _code(packing, values)
    shape = _shape_of_behaviours(values, code)
    _behaviours[(slots(users, rows, shape["LENGTH"]),)](
        offsets, packed, query_packed, query_offsets, cuts, grad_sums, out, users, rows, queries,
        last, size, packing.groups, **code, PARTS=parts(values.dtype), **shape,
    )  # fmt: skip
    return out


def _launch_queries(
    values: Tensor,
    ids: Tensor | None,
    offsets: Tensor,
    packed: Tensor,
    query_packed: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    packing: Packing,
    last: int,
    interest: Tensor,
    grad: Tensor | None = None,
    grad_sums: Tensor | None = None,
) -> None:
    rows, size = packed.shape[0], values.shape[1]
    queries, users = cuts.shape[0], offsets.shape[0] - 1
    if queries == 0:
        return
    code = _code(packing, values)
    _queries[(slots(users, queries, code["QUERIES"]),)](
        values, ids, values.shape[0], offsets, packed, query_packed, query_offsets, cuts, interest,
        grad, grad_sums, users, rows, queries, last, size, packing.groups, **code,
        BACKWARD=grad is not None,
        PARTS=parts(values.dtype), **_shape(values, code),
    )  # fmt: skip


def _code(packing: Packing, values: Tensor) -> dict[str, int]:
    return {
        "TAU": packing.tau,
        "BITS": packing.bits,
        "GROUPS": packing.padded_groups,
        "WORDS": packing.words,
        "SIZE": padded_size(values.shape[1]),
        "QUERIES": max(1, columns_at_once(values) // packing.padded_groups),
    }


def _shape(values: Tensor, code: dict[str, int]) -> LaunchShape:
    size, older = values.shape[1], dispatch.before_hopper(values)
    rule = {"LENGTH": 64, "STAGES": 2, "num_warps": 4 if size <= 64 else 8}
    if values.dtype == torch.float32 or size > 128:
        rule = {"LENGTH": 32, "STAGES": 2 if older and size <= 128 else 1, "num_warps": 8}
    if values.dtype == torch.float32 and size <= 64 and not older:
        rule = {"LENGTH": 16, "STAGES": 1, "num_warps": 4}
    return launch_shape("pairs", values.device, values.dtype, *_sizes(size, code), rule=rule)


def _shape_of_behaviours(values: Tensor, code: dict[str, int]) -> LaunchShape:
    size, older = values.shape[1], dispatch.before_hopper(values)
    wide = values.dtype == torch.float32 or size > 128
    rule = {
        "LENGTH": 32 if older or wide or size <= 64 else 64,
        "STAGES": 1 if wide else 2,
        "num_warps": 8 if older or wide or size > 64 else 4,
    }
    if values.dtype == torch.float32 and size <= 64 and not older:
        rule = {"LENGTH": 64, "STAGES": 1, "num_warps": 4 if size <= 32 else 8}
    sizes = _sizes(size, code)
    return launch_shape("pairs_backward", values.device, values.dtype, *sizes, rule=rule)


def _sizes(size: int, code: dict[str, int]) -> tuple[int, int]:
    return padded_size(size), code["QUERIES"] * code["GROUPS"]
