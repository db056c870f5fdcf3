"""Queries at cuts by pairs: each query's buckets are sums over the behaviours it sees, by masks.

A mask says which behaviours share a query's codes: these are spread over columns of queries and
groups, and compared with the queries'.

Time grows with queries times behaviours, as exact attention's does, but for any number of buckets;
`walk.py` is for tables that fit into four programs. A program takes some queries of a user.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashtab.kernels.core import dispatch
from hashtab.kernels.core.tiles import UNSPECIALIZED, first_above, slots, span, user_slot
from hashtab.kernels.core.tuning import LaunchShape, launch_shape
from hashtab.kernels.sdim.packing import Packing
from hashtab.kernels.sdim.triton.hashing import load_codes
from hashtab.kernels.sdim.triton.rows import (
    load_behaviours,
    load_rows,
    padded_size,
    store_rows,
)
from hashtab.kernels.sdim.triton.sums import (
    add_products,
    bfloat16_parts,
    code_factor,
    code_numbers,
    collect,
    dot_of_parts,
    group_factor,
    inverse_norm,
    members,
    members_of_rows,
    norm_gradient,
    parts,
)


@triton.jit
def _load_sight(cuts, query, there, length, last):
    """Return from where up to where queries see a history of `length`, int64."""
    cut = tl.load(cuts + query, mask=there, other=0)
    cut = tl.minimum(tl.maximum(cut, 0), length)
    return tl.maximum(cut - last, 0), cut


@triton.jit
def _load_wanted(
    query_packed,
    query,
    there,
    group,
    groups: tl.constexpr,
    BITS: tl.constexpr,
    TAU: tl.constexpr,
    WORDS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Return codes `[COLUMNS]` of queries in groups as numbers, -1 where either is not there."""
    bit = group * BITS
    word = tl.load(query_packed + query * WORDS + bit // 32, mask=there, other=0)
    code = (word >> bit % 32) & ((1 << TAU) - 1)
    return code_numbers(tl.where(there & (group < groups), code, -1), EXACT)


@triton.jit
def _add_tile(
    sums,
    values,
    ids,
    items,
    packed,
    of_group,
    wanted,
    start,
    length,
    begin,
    end,
    size: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    LENGTH: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Return the buckets' sums plus a tile of behaviours from `start` on.

    WHOLE says that all queries see all of the tile.
    """
    row = start + tl.arange(0, LENGTH)
    far = row.to(tl.int64)  # a history may have more numbers than an int32 counts
    x = load_behaviours(values, ids, items, far, length, size, SIZE)
    codes = load_codes(packed, far, row < length, GROUPS, BITS, TAU, WORDS, LENGTH)
    codes = code_factor(codes, LENGTH, GROUPS, PARTS == 0)
    member = members(of_group, codes, wanted, x.dtype, PARTS == 0)
    if not WHOLE:
        seen = (row[None, :] >= begin[:, None]) & (row[None, :] < end[:, None])
        member = tl.where(seen, member, 0.0)
    return add_products(sums, member, x, PARTS)


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
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return `[COLUMNS, SIZE]`: each query's buckets, of one user's behaviours.

    Most tiles are seen by all queries: these need no look at rows.
    """
    high = tl.max(end, 0)
    begin, end = tl.where(there, begin, high), tl.where(there, end, high)
    low = tl.minimum(tl.min(begin, 0), high)
    if ids is None:
        values += low * size
    else:
        ids += low
    packed += low * WORDS
    length = tl.cast(high - low, tl.int32)
    begin, end = (begin - low).to(tl.int32), (end - low).to(tl.int32)
    first = tl.cdiv(tl.max(tl.where(there, begin, 0), 0), LENGTH) * LENGTH
    behind = tl.maximum(tl.min(end, 0) // LENGTH * LENGTH, first)
    of_group = group_factor(tl.arange(0, COLUMNS) % GROUPS, GROUPS, PARTS == 0)
    sums = tl.zeros([COLUMNS, SIZE], tl.float32)
    for start in tl.range(first, behind, LENGTH, num_stages=STAGES):
        sums = _add_tile(
            sums, values, ids, items, packed, of_group, wanted, start, length, begin, end, size,
            TAU, BITS, GROUPS, WORDS, SIZE, LENGTH, PARTS, True,
        )  # fmt: skip
    for start in tl.range(0, length - behind + first, LENGTH, num_stages=STAGES):
        start += tl.where(start < first, 0, behind - first)
        sums = _add_tile(
            sums, values, ids, items, packed, of_group, wanted, start, length, begin, end, size,
            TAU, BITS, GROUPS, WORDS, SIZE, LENGTH, PARTS, False,
        )  # fmt: skip
    return sums


@triton.jit
def _store_parts(target, found, mask, distance, PARTS: tl.constexpr):
    """Store float32 numbers in parts that lie `distance` apart, as `_collect` multiplies them."""
    if PARTS == 0:
        tl.store(target, found, mask=mask)
    else:
        parts = bfloat16_parts(found, PARTS)
        for i in tl.static_range(PARTS):
            tl.store(target + i * distance, parts[i], mask=mask)


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
    COLUMNS: tl.constexpr = QUERIES * GROUPS
    user, query_begin, query_end = user_slot(query_offsets, users, tl.program_id(0), QUERIES)
    first_query, behind_query = span(query_offsets, user, queries)
    query_begin = tl.maximum(query_begin, first_query)
    query_end = tl.minimum(query_end, behind_query)
    if query_begin >= query_end:
        return
    query = query_begin + tl.arange(0, COLUMNS) // GROUPS
    there = query < query_end
    first, behind = span(offsets, user, rows)
    begin, end = _load_sight(cuts, query, there, behind - first, last)
    group = tl.arange(0, COLUMNS) % GROUPS
    wanted = _load_wanted(query_packed, query, there, group, groups, BITS, TAU, WORDS, PARTS == 0)
    if ids is None:
        values += first * size
    else:
        ids += first
    sums = _sums_of_queries(
        values, ids, items, packed + first * WORDS, wanted, begin, end, there, size, TAU, BITS,
        GROUPS, WORDS, SIZE, COLUMNS, LENGTH, PARTS, STAGES,
    )  # fmt: skip
    column = tl.arange(0, SIZE)
    if not BACKWARD:
        unit = sums * (inverse_norm(tl.sum(sums * sums, 1)) / groups)[:, None]
        mean = tl.sum(tl.reshape(unit, [QUERIES, GROUPS, SIZE]), 1)
        length = tl.cast(query_end - query_begin, tl.int32)
        store_rows(interest + query_begin * size, tl.arange(0, QUERIES), length, mean, size, SIZE)
    else:
        mask = there[:, None] & (column < size)[None, :]
        address = query[:, None] * size + column[None, :]
        upstream = tl.load(grad + address, mask=mask, other=0.0).to(tl.float32)
        found = norm_gradient(sums, upstream, groups)
        target = grad_sums + (query * GROUPS + group)[:, None] * size + column[None, :]
        _store_parts(target, found, mask, tl.cast(queries, tl.int64) * GROUPS * size, PARTS)


@triton.jit
def _collect(
    found,
    codes,
    position,
    query_packed,
    cuts,
    grad_sums,
    begin,
    behind,
    length,
    last,
    queries,
    size: tl.constexpr,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Return `found` `[LENGTH, SIZE]` plus what queries from `begin` up to `behind` give.

    WHOLE says that they see all of these behaviours.
    """
    COLUMNS: tl.constexpr = QUERIES * GROUPS
    distance = tl.cast(queries, tl.int64) * GROUPS * size
    column = tl.arange(0, COLUMNS)
    group = column % GROUPS
    of_group = group_factor(group, GROUPS, PARTS == 0)
    for start in tl.range(begin, behind, QUERIES, num_stages=STAGES):
        query = start + column // GROUPS
        there = query < behind
        wanted = _load_wanted(
            query_packed, query, there, group, groups, BITS, TAU, WORDS, PARTS == 0
        )
        member = members_of_rows(codes, of_group, wanted, tl.bfloat16, PARTS == 0)
        if not WHOLE:
            first, end = _load_sight(cuts, query, there, length, last)
            seen = position[:, None] >= first.to(tl.int32)[None, :]
            seen &= position[:, None] < end.to(tl.int32)[None, :]
            member = tl.where(seen, member, 0.0)
        lines = tl.cast((behind - start) * GROUPS, tl.int32)
        part = grad_sums + start * GROUPS * size
        high = load_rows(part, column, lines, size, SIZE)
        if PARTS == 0:
            found += collect(member, high, PARTS)
        else:
            middle = load_rows(part + distance, column, lines, size, SIZE)
            if PARTS == 2:
                found += dot_of_parts(member, (high, middle))
            else:
                low = load_rows(part + 2 * distance, column, lines, size, SIZE)
                found += dot_of_parts(member, (high, middle, low))
    return found


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
    codes = code_factor(codes, LENGTH, GROUPS, PARTS == 0)
    position = (row - first).to(tl.int32)
    top, bottom = row_begin - first, row_end - first - 1
    first_query, behind_query = span(query_offsets, user, queries)
    begin = first_above(cuts, first_query, behind_query, top)
    behind_query = first_above(cuts, begin, behind_query, bottom + last)
    whole_begin = first_above(cuts, begin, behind_query, bottom)
    whole_behind = first_above(cuts, whole_begin, behind_query, top + last)
    found = tl.zeros([LENGTH, SIZE], tl.float32)
    found = _collect(
        found, codes, position, query_packed, cuts, grad_sums, begin, whole_begin, behind - first,
        last, queries, size, groups, TAU, BITS, GROUPS, WORDS, SIZE, QUERIES, PARTS, STAGES, False,
    )  # fmt: skip
    found = _collect(
        found, codes, position, query_packed, cuts, grad_sums, whole_begin, whole_behind,
        behind - first, last, queries, size, groups, TAU, BITS, GROUPS, WORDS, SIZE, QUERIES, PARTS,
        STAGES, True,
    )  # fmt: skip
    found = _collect(
        found, codes, position, query_packed, cuts, grad_sums, whole_behind, behind_query,
        behind - first, last, queries, size, groups, TAU, BITS, GROUPS, WORDS, SIZE, QUERIES, PARTS,
        STAGES, False,
    )  # fmt: skip
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
    of_parts = parts(values.dtype)
    grad_sums = values.new_empty(
        max(of_parts, 1),
        queries,
        packing.padded_groups,
        size,
        dtype=torch.bfloat16 if of_parts else torch.float32,
    )
    _launch_queries(
        values, ids, offsets, packed, query_packed, query_offsets, cuts, packing, last, out, grad,
        grad_sums,
    )  # fmt: skip
    code = _code(packing, values, _columns_of_behaviours(values))
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
    code = _code(packing, values, _columns(values))
    _queries[(slots(users, queries, code["QUERIES"]),)](
        values, ids, values.shape[0], offsets, packed, query_packed, query_offsets, cuts, interest,
        grad, grad_sums, users, rows, queries, last, size, packing.groups, **code,
        BACKWARD=grad is not None,
        PARTS=parts(values.dtype), **_shape(values, code),
    )  # fmt: skip


def _columns(values: Tensor) -> int:
    """Return how many buckets of queries a program makes at once."""
    return 128 if values.shape[1] <= 64 else 64


def _columns_of_behaviours(values: Tensor) -> int:
    """Return how many gradients of buckets a program collects from at once."""
    return 32 if values.dtype == torch.float32 or values.shape[1] > 128 else 64


def _code(packing: Packing, values: Tensor, columns: int) -> dict[str, int]:
    return {
        "TAU": packing.tau,
        "BITS": packing.bits,
        "GROUPS": packing.padded_groups,
        "WORDS": packing.words,
        "SIZE": padded_size(values.shape[1]),
        "QUERIES": max(1, columns // packing.padded_groups),
    }


def _shape(values: Tensor, code: dict[str, int]) -> LaunchShape:
    size, older = values.shape[1], dispatch.before_hopper(values)
    if values.dtype == torch.float32 or size > 128:
        rule = {"LENGTH": 32, "STAGES": 1, "num_warps": 8 if older or size > 128 else 4}
        if values.dtype == torch.float32 and size > 128:
            rule["LENGTH"] = 16
        elif 32 < size <= 128 and not older:
            rule["LENGTH"] = 64
    elif size > 64:
        rule = {"LENGTH": 64, "STAGES": 2, "num_warps": 8 if older else 4}
    else:
        rule = {"LENGTH": 64, "STAGES": 2 if older else 3, "num_warps": 4}
    return launch_shape("pairs", values.device, values.dtype, *_sizes(size, code), rule=rule)


def _shape_of_behaviours(values: Tensor, code: dict[str, int]) -> LaunchShape:
    size, older = values.shape[1], dispatch.before_hopper(values)
    if size > 128:
        rule = {"LENGTH": 32, "STAGES": 1, "num_warps": 8}
    elif values.dtype == torch.float32:
        length = 128 if size <= 64 else 64
        rule = {"LENGTH": length // 2 if older else length, "STAGES": 1}
        rule["num_warps"] = 8 if older or 32 < size <= 64 else 4
    elif size <= 64:
        rule = {"LENGTH": 64 if older else 128, "STAGES": 1, "num_warps": 8 if older else 4}
    else:
        rule = {"LENGTH": 64, "STAGES": 2, "num_warps": 8 if older else 4}
    sizes = _sizes(size, code)
    return launch_shape("pairs_backward", values.device, values.dtype, *sizes, rule=rule)


def _sizes(size: int, code: dict[str, int]) -> tuple[int, int, int]:
    return padded_size(size), code["QUERIES"] * code["GROUPS"], max(16, code["GROUPS"])
