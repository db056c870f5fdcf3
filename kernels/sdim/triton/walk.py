"""Queries at cuts by one walk over each history, for tables that fit into a program.

Behaviours come in blocks, and all that concerns a block is a matrix product. With T the table at
its begin, H its one-hot codes, X its behaviours, and L its queries' sight of it (all of 0 and 1):

- a bucket's squared norm grows by `2 x_j . T_b(j)` at each behaviour of it, so the norms at the
  cuts are those at the begin and `L (H o (2 X T + 2 lower(X X') H))`, halves on the diagonal;
- with W the queries' codes over those norms, their interests are `W T + ((W H') o L) X`.

So nothing is made for each query, group and dimension; time grows with behaviours plus queries.
A program takes a piece of a user; tables at the begin of later pieces come from earlier ones' sums.

Backward walks in reverse. The gradient of a query's bucket is `a g - c S`, S the bucket's sum at
the cut, a = 1 / (G |S|), c = a (S . g) / |S|^2. What behaviour j collects of the later queries is,
with C_b the sum of their c, `sum a g - C_b(j) T_b(j) - sum over later i in b of C_b(i) x_i`: sums
that later blocks leave (`later`, `count`), and products within the block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashtab.kernels.core.dispatch import interpreted
from hashtab.kernels.core.tiles import UNSPECIALIZED, first_above, slots, span
from hashtab.kernels.sdim.packing import Packing
from hashtab.kernels.sdim.triton.encode import pieces_of_tables
from hashtab.kernels.sdim.triton.hashing import load_codes, load_wanted
from hashtab.kernels.sdim.triton.rows import load_rows, padded_size, store_rows
from hashtab.kernels.sdim.triton.sums import (
    inverse_norm,
    partial_of,
    partial_sums,
    piece,
)

TILE = 2048  # rows of a piece
_NEVER = tl.constexpr(1 << 30)


@triton.jit
def _queries_of_piece(cuts, query_offsets, user, queries, begin, end, is_first, is_last):
    """Return the queries whose cuts lie within (begin, end], in a user's first piece at 0 too."""
    first, behind = span(query_offsets, user, queries)
    low = first
    if is_first == 0:
        low = first_above(cuts, first, behind, begin)
    high = behind
    if is_last == 0:
        high = first_above(cuts, low, behind, end)
    return low, high


@triton.jit
def _cut(cuts, query, behind, origin, length):
    """Return cuts relative to `origin` within 0 .. length, `_NEVER` behind the last query."""
    there = query < behind
    found = tl.load(cuts + query, mask=there, other=0) - origin
    found = tl.minimum(tl.maximum(found, 0), length).to(tl.int32)
    return tl.where(there, found, _NEVER)


@triton.jit
def _cut_before(cuts, query, low, origin, length):
    """Return cuts relative to `origin` within 0 .. length, -1 before the query `low`."""
    there = query >= low
    found = tl.load(cuts + query, mask=there, other=0) - origin
    found = tl.minimum(tl.maximum(found, 0), length).to(tl.int32)
    return tl.where(there, found, -1)


@triton.jit
def _members(
    codes,
    GROUPS: tl.constexpr,
    BUCKETS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return `[LENGTH, COLUMNS]`, whether a row lies in the bucket of a column; -1 lies in none."""
    # A product spreads codes over columns as it leaves other products: without a word between
    # threads.
    column = tl.arange(0, COLUMNS)
    of_group = tl.arange(0, GROUPS)[:, None] == (column // BUCKETS)[None, :]
    spread = tl.dot(codes.to(OPERAND), of_group.to(OPERAND), input_precision=PRECISION)
    return spread == (column % BUCKETS).to(tl.float32)[None, :]


@triton.jit
def _asked(
    query_packed,
    query,
    there,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return `[QUERIES, COLUMNS]`, whether a query reads a column; none where it is not there."""
    codes = load_wanted(query_packed, query, there, groups, GROUPS, BITS, TAU, WORDS, QUERIES)
    return _members(codes, GROUPS, 1 << TAU, COLUMNS, OPERAND, PRECISION)


@triton.jit
def _load_scales(
    scales,
    query,
    there,
    GROUPS: tl.constexpr,
    BUCKETS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return `[QUERIES, COLUMNS]` float32: the scale of a query's group in all of its columns."""
    group, column = tl.arange(0, GROUPS), tl.arange(0, COLUMNS)
    address = query[:, None] * GROUPS + group[None, :]
    loaded = tl.load(scales + address, mask=there[:, None], other=0.0).to(OPERAND)
    of_group = group[:, None] == (column // BUCKETS)[None, :]
    return tl.dot(loaded, of_group.to(OPERAND), input_precision=PRECISION)


@triton.jit
def _norms_within(x, hot, member, table_t, LENGTH: tl.constexpr, PRECISION: tl.constexpr):
    """Return `[LENGTH, COLUMNS]`: by what a behaviour lets the squared norm of its buckets grow."""
    index = tl.arange(0, LENGTH)
    gram = tl.dot(x, tl.trans(x), input_precision=PRECISION)
    gram = tl.where(index[:, None] == index[None, :], 0.5 * gram, gram)
    lower = tl.where(index[:, None] >= index[None, :], gram, 0.0).to(x.dtype)
    along = tl.dot(x, table_t, input_precision=PRECISION)
    along = tl.dot(lower, hot, along, input_precision=PRECISION)
    return tl.where(member, 2 * along, 0.0).to(x.dtype)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _walk(
    values,
    offsets,
    packed,
    query_packed,
    query_offsets,
    cuts,
    tables,
    interest,
    scales,
    users,
    rows,
    queries,
    size: tl.constexpr,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    user, begin, end, alone = piece(offsets, users, rows, TILE)
    if (begin >= end) & (alone == 0):
        return
    first, behind = span(offsets, user, rows)
    origin = begin - first
    query, behind_query = _queries_of_piece(
        cuts, query_offsets, user, queries, origin, end - first, begin == first, end == behind
    )
    if query >= behind_query:
        return
    BUCKETS: tl.constexpr = 1 << TAU
    length = tl.cast(end - begin, tl.int32)
    column = tl.arange(0, SIZE)
    table_t = tl.zeros([SIZE, COLUMNS], tl.float32)
    if (origin > 0) & (rows > TILE):
        table_t = _load_table(tables, offsets, user, rows, origin, groups, size, SIZE, COLUMNS,
                              BUCKETS, TILE)  # fmt: skip
    values += begin * size
    packed += begin * WORDS
    inner = tl.arange(0, LENGTH)
    start = tl.cast(0, tl.int32)
    x_next = load_rows(values, inner, length, size, SIZE)
    codes_next = load_codes(packed, inner, inner < length, GROUPS, BITS, TAU, WORDS, LENGTH)
    while query < behind_query:
        row = start + inner
        # A block ends where a program has all the queries it takes at once.
        stop = tl.minimum(start + LENGTH, _cut(cuts, query + QUERIES, behind_query, origin, length))
        several = query + tl.arange(0, QUERIES)
        at = _cut(cuts, several, behind_query, origin, length)
        here = at <= stop
        x = tl.where((row < stop)[:, None], x_next, 0.0).to(OPERAND)
        codes = codes_next
        x_next = load_rows(values, stop + inner, length, size, SIZE)
        codes_next = load_codes(
            packed, stop + inner, stop + inner < length, GROUPS, BITS, TAU, WORDS, LENGTH
        )
        member = _members(codes, GROUPS, BUCKETS, COLUMNS, OPERAND, PRECISION)
        hot = member.to(OPERAND)
        found = tl.sum(here.to(tl.int32), 0)
        if found > 0:
            table = table_t.to(OPERAND)
            grown = _norms_within(x, hot, member, table, LENGTH, PRECISION)
            norms = tl.sum(table_t * table_t, 0)
            seen = (row[None, :] < at[:, None]) & here[:, None]
            asked = _asked(
                query_packed, several, here, groups, TAU, BITS, GROUPS, WORDS, COLUMNS, QUERIES,
                OPERAND, PRECISION,
            )  # fmt: skip
            square = tl.dot(seen.to(OPERAND), grown, input_precision=PRECISION)
            scale = tl.where(asked, inverse_norm(square + norms[None, :]), 0.0)
            weight = (scale / groups).to(OPERAND)
            shared = tl.dot(weight, tl.trans(hot), input_precision=PRECISION)
            mean = tl.dot(weight, tl.trans(table), input_precision=PRECISION)
            local = tl.where(seen, shared, 0.0).to(OPERAND)
            mean = tl.dot(local, x, mean, input_precision=PRECISION)
            target = interest + several[:, None] * size + column[None, :]
            tl.store(target, mean, mask=here[:, None] & (column < size)[None, :])
            kept = tl.sum(tl.reshape(scale, [QUERIES, GROUPS, BUCKETS]), 2)
            target = scales + several[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
            tl.store(target, kept, mask=here[:, None])
        table_t = tl.dot(tl.trans(x), hot, table_t, input_precision=PRECISION)
        # Cuts that do not ascend must not keep a walk from its end.
        query += tl.maximum(found, (stop <= start).to(tl.int32))
        start = tl.maximum(start, stop)


@triton.jit
def _load_table(
    tables,
    offsets,
    user,
    rows,
    origin,
    groups: tl.constexpr,
    size: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BUCKETS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return `[SIZE, COLUMNS]` float32, what is kept for the piece at `origin` of a user."""
    column, line = tl.arange(0, SIZE), tl.arange(0, COLUMNS)
    inside = (line < groups * BUCKETS)[None, :] & (column < size)[:, None]
    place = partial_of(offsets, user, rows, origin // TILE, TILE) * (groups * BUCKETS * size)
    return tl.load(tables + place + line[None, :] * size + column[:, None], mask=inside, other=0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _walk_back(
    grad,
    values,
    offsets,
    packed,
    query_packed,
    query_offsets,
    cuts,
    tables,
    later,
    counts,
    scales,
    grad_values,
    users,
    rows,
    queries,
    size: tl.constexpr,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    EMIT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk back and store the behaviours' gradients, or without EMIT what a piece leaves behind.

    The latter is for users of several pieces, whose earlier pieces need it of all later ones.
    """
    user, begin, end, alone = piece(offsets, users, rows, TILE)
    if begin >= end:
        return
    if alone & (EMIT == 0):
        return
    first, behind = span(offsets, user, rows)
    origin = begin - first
    low_query, behind_query = _queries_of_piece(
        cuts, query_offsets, user, queries, origin, end - first, begin == first, end == behind
    )
    BUCKETS: tl.constexpr = 1 << TAU
    length = tl.cast(end - begin, tl.int32)
    column, line = tl.arange(0, SIZE), tl.arange(0, COLUMNS)
    values += begin * size
    grad_values += begin * size
    packed += begin * WORDS
    inner = tl.arange(0, LENGTH)
    place = partial_of(offsets, user, rows, origin // TILE, TILE)
    table_t = tl.zeros([SIZE, COLUMNS], tl.float32)
    later_t = tl.zeros([SIZE, COLUMNS], tl.float32)
    count = tl.zeros([COLUMNS], tl.float32)
    if (alone == 0) & (rows > TILE):
        if (origin > 0) & (rows > TILE):
            table_t = _load_table(tables, offsets, user, rows, origin, groups, size, SIZE,
                                  COLUMNS, BUCKETS, TILE)  # fmt: skip
        if EMIT:
            later_t = _load_table(later, offsets, user, rows, origin, groups, size, SIZE,
                                  COLUMNS, BUCKETS, TILE)  # fmt: skip
            inside = line < groups * BUCKETS
            count = tl.load(counts + place * COLUMNS + line, mask=inside, other=0.0)
    for start in range(0, length, LENGTH):
        row = start + inner
        x = load_rows(values, row, length, size, SIZE).to(OPERAND)
        codes = load_codes(packed, row, row < length, GROUPS, BITS, TAU, WORDS, LENGTH)
        hot = _members(codes, GROUPS, BUCKETS, COLUMNS, OPERAND, PRECISION).to(OPERAND)
        table_t = tl.dot(tl.trans(x), hot, table_t, input_precision=PRECISION)

    query = behind_query - 1
    stop = length
    minus_table_t = -table_t
    while stop > 0:
        start = tl.maximum(stop - LENGTH, 0)
        below = _cut_before(cuts, query - QUERIES, low_query, origin, length)
        start = tl.maximum(start, tl.minimum(below, stop))
        row = start + inner
        x = load_rows(values, row, stop, size, SIZE).to(OPERAND)
        codes = load_codes(packed, row, row < stop, GROUPS, BITS, TAU, WORDS, LENGTH)
        several = query - tl.arange(0, QUERIES)
        at = _cut_before(cuts, several, low_query, origin, length)
        # Without a row, for more queries at one cut than are taken at once, those at it are next.
        here = (at > start) | ((start == stop) & (at == stop))
        member = _members(codes, GROUPS, BUCKETS, COLUMNS, OPERAND, PRECISION)
        hot = member.to(OPERAND)
        minus_table_t = tl.dot(tl.trans(x), hot, minus_table_t, input_precision=PRECISION)
        table = (-minus_table_t).to(OPERAND)
        seen = (row[None, :] < at[:, None]) & here[:, None]
        asked = _asked(
            query_packed, several, here, groups, TAU, BITS, GROUPS, WORDS, COLUMNS, QUERIES,
            OPERAND, PRECISION,
        )  # fmt: skip
        scale = _load_scales(scales, several, here, GROUPS, BUCKETS, COLUMNS, OPERAND, PRECISION)
        scale = tl.where(asked, scale, 0.0)
        upstream = tl.load(
            grad + several[:, None] * size + column[None, :],
            mask=here[:, None] & (column < size)[None, :],
            other=0.0,
        ).to(OPERAND)
        local = tl.dot(upstream, tl.trans(x), input_precision=PRECISION)
        local = tl.where(seen, local, 0.0).to(OPERAND)
        along = tl.dot(upstream, table, input_precision=PRECISION)
        along = tl.dot(local, hot, along, input_precision=PRECISION)
        weight = scale / groups
        kept = (weight * scale * scale * along).to(OPERAND)
        weight = weight.to(OPERAND)
        counted = tl.dot(tl.trans(seen.to(OPERAND)), kept, input_precision=PRECISION)
        minus_share = tl.where(member, -(counted + count[None, :]), 0.0).to(OPERAND)
        count += tl.sum(kept.to(tl.float32), 0)
        if EMIT:
            found = tl.dot(hot, tl.trans(later_t.to(OPERAND)), input_precision=PRECISION)
            pulled = tl.dot(weight, tl.trans(hot), input_precision=PRECISION)
            pulled = tl.trans(tl.where(seen, pulled, 0.0)).to(OPERAND)
            found = tl.dot(pulled, upstream, found, input_precision=PRECISION)
            found = tl.dot(minus_share, tl.trans(table), found, input_precision=PRECISION)
            shared = tl.dot(minus_share, tl.trans(hot), input_precision=PRECISION)
            earlier = tl.where(inner[:, None] >= inner[None, :], shared, 0.0).to(OPERAND)
            found = tl.dot(earlier, x, found, input_precision=PRECISION)
            behind_t = tl.where(inner[:, None] > inner[None, :], shared, 0.0).to(OPERAND)
            found = tl.dot(tl.trans(behind_t), x, found, input_precision=PRECISION)
            store_rows(grad_values, row, stop, found, size, SIZE)
        later_t = tl.dot(tl.trans(upstream), weight, later_t, input_precision=PRECISION)
        later_t = tl.dot(tl.trans(x), minus_share, later_t, input_precision=PRECISION)
        # Cuts that do not ascend must not keep a walk from its end.
        query -= tl.maximum(tl.sum(here.to(tl.int32), 0), (start == stop).to(tl.int32))
        stop = start
    if EMIT == 0:
        inside = (line < groups * BUCKETS)[None, :] & (column < size)[:, None]
        target = later + place * (groups * BUCKETS * size)
        tl.store(target + line[None, :] * size + column[:, None], later_t, mask=inside)
        tl.store(counts + place * COLUMNS + line, count)


@triton.jit
def _accumulate(
    offsets,
    sums,
    tables,
    rows,
    width,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a user's table at the begin of each piece, the sum of the pieces before it."""
    user = tl.program_id(0).to(tl.int64)
    begin, end = span(offsets, user, rows)
    pieces = (end - begin + TILE - 1) // TILE
    if pieces <= 1:
        return
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < width
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(0, pieces):
        place = partial_of(offsets, user, rows, index, TILE) * width + element
        tl.store(tables + place, total, mask=inside)
        total += tl.load(sums + place, mask=inside, other=0.0)


@triton.jit
def _accumulate_back(
    offsets,
    sums,
    later,
    counts,
    kept_counts,
    rows,
    width,
    size: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace what each piece leaves by what all later ones do.

    A piece was walked as if no query came later; each of its behaviours also counts for those.
    """
    user = tl.program_id(0).to(tl.int64)
    begin, end = span(offsets, user, rows)
    pieces = (end - begin + TILE - 1) // TILE
    if pieces <= 1:
        return
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < width
    line = element // size
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for step in range(0, pieces):
        piece_of_user = partial_of(offsets, user, rows, pieces - 1 - step, TILE)
        place = piece_of_user * width + element
        own = tl.load(later + place, mask=inside, other=0.0)
        own -= count * tl.load(sums + place, mask=inside, other=0.0)
        tl.store(later + place, total, mask=inside)
        total += own
        place = piece_of_user * COLUMNS + line
        tl.store(kept_counts + place, count, mask=inside & (element % size == 0))
        count += tl.load(counts + place, mask=inside, other=0.0)


def attend_at(
    values: Tensor,
    offsets: Tensor,
    packed: Tensor,
    query_packed: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    packing: Packing,
) -> tuple[Tensor, Tensor]:
    """Return the interests `[Q, D]` in the dtype of the values, and scales `[Q, GROUPS]` float32.

    The latter are 1 / |S[g, code_g(q)]|, zero for an empty bucket.
    """
    (rows, size), queries, users = values.shape, cuts.shape[0], offsets.shape[0] - 1
    interest = values.new_empty(queries, size)
    scales = values.new_empty(queries, packing.padded_groups, dtype=torch.float32)
    if queries == 0:
        return interest, scales
    _, tables = _tables(values, offsets, packed, packing)
    _walk[(slots(users, rows, TILE),)](
        values, offsets, packed, query_packed, query_offsets, cuts, tables, interest, scales,
        users, rows, queries, size, packing.groups,
        **_code(packing, size, values.dtype, queries, rows), **_shape(size, values.dtype),
    )  # fmt: skip
    return interest, scales


def attend_at_backward(
    grad: Tensor,
    values: Tensor,
    offsets: Tensor,
    packed: Tensor,
    query_packed: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    scales: Tensor,
    packing: Packing,
) -> Tensor:
    """Return the gradient of the behaviours `[N, D]` in their dtype."""
    (rows, size), queries, users = values.shape, cuts.shape[0], offsets.shape[0] - 1
    out = values.new_empty(values.shape)
    if out.numel() == 0:
        return out
    sums, tables = _tables(values, offsets, packed, packing)
    later = torch.empty_like(tables)
    code = _code(packing, size, values.dtype, queries, rows)
    counts = partial_sums(rows, TILE, packing.padded_groups << packing.tau, values)

    def walk_back(counts: Tensor, emit: bool) -> None:
        _walk_back[(slots(users, rows, TILE),)](
            grad, values, offsets, packed, query_packed, query_offsets, cuts, tables, later,
            counts, scales, out, users, rows, queries, size, packing.groups, **code, EMIT=emit,
            **_shape(size, values.dtype),
        )  # fmt: skip

    if rows > TILE:
        walk_back(counts, emit=False)
        own, counts = counts, torch.empty_like(counts)
        width = tables.shape[1]
        _accumulate_back[users, triton.cdiv(width, _ELEMENTS)](
            offsets, sums, later, own, counts, rows, width, size, code["COLUMNS"], TILE=TILE,
            BLOCK=_ELEMENTS, num_warps=4,
        )  # fmt: skip
    walk_back(counts, emit=True)
    return out


_ELEMENTS = 1024  # of a table that a program accumulates over pieces


def _tables(
    values: Tensor, offsets: Tensor, packed: Tensor, packing: Packing
) -> tuple[Tensor, Tensor]:
    """Return sums of each piece of users who have several, and tables at their beginnings."""
    rows = values.shape[0]
    if rows <= TILE:
        none = values.new_empty(0, dtype=torch.float32)
        return none, none
    sums = pieces_of_tables(values, offsets, packed, packing, TILE)
    tables, width = torch.empty_like(sums), sums.shape[1]
    _accumulate[offsets.shape[0] - 1, triton.cdiv(width, _ELEMENTS)](
        offsets, sums, tables, rows, width, TILE=TILE, BLOCK=_ELEMENTS, num_warps=4
    )
    return sums, tables


def _code(
    packing: Packing, size: int, dtype: torch.dtype, queries: int, rows: int
) -> dict[str, object]:
    exact = interpreted() or dtype != torch.bfloat16
    return {
        "TAU": packing.tau,
        "BITS": packing.bits,
        "GROUPS": packing.padded_groups,
        "WORDS": packing.words,
        "SIZE": padded_size(size),
        "COLUMNS": packing.padded_groups << packing.tau,
        "QUERIES": _queries_at_once(queries, rows),
        "TILE": TILE,
        "OPERAND": tl.float32 if exact else tl.bfloat16,
        "PRECISION": "ieee" if interpreted() else "tf32",
    }


def _queries_at_once(queries: int, rows: int) -> int:
    """Return how many queries a block takes: most that it may have, for few would end it early."""
    average = 64 * queries / max(rows, 1)
    return 16 if average <= 12 else 32 if average <= 24 else 64


def _shape(size: int, dtype: torch.dtype) -> dict[str, int]:
    if interpreted():
        return {"LENGTH": 16, "num_warps": 4}
    return {"LENGTH": 32, "num_warps": 4 if size <= 64 and dtype == torch.bfloat16 else 8}
