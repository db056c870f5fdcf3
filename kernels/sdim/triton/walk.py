"""Queries at cuts by walks over each history, for small tables.

A walk keeps a user's table in registers, or 128 rows of a larger one; the walks add to each other.
It adds behaviours in blocks, by products with their one-hot codes, up to the next cut; there one
product of the candidates' codes with the unit sums answers all candidates of a request. So time
grows with behaviours plus requests. A program takes a piece of a user; tables at the begin of later
pieces come from earlier ones' sums.

Backward walks in reverse, and takes behaviours out of the table again. All candidates of a request
share the sums S that it met: the gradient of a bucket is `(U - (u . U) u) / (G |S|)`, u = S / |S|,
U the sum of the gradients of the candidates in it. A behaviour collects those of later requests.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashtab.kernels.core.dispatch import interpreted
from hashtab.kernels.core.tiles import UNSPECIALIZED, first_above, slots, span
from hashtab.kernels.sdim.packing import Packing
from hashtab.kernels.sdim.triton.encode import pieces_of_tables
from hashtab.kernels.sdim.triton.hashing import load_codes, load_wanted
from hashtab.kernels.sdim.triton.rows import (
    behaviours_from,
    gather_rows,
    load_behaviours,
    load_rows,
    padded_size,
)
from hashtab.kernels.sdim.triton.sums import inverse_norm, partial_of, piece

TILE = 2048  # rows of a piece
_NEVER = tl.constexpr(1 << 30)
# Of the most that a bucket's square held: what is below is rounding left by what was taken out.
_NOTHING = tl.constexpr(2.0**-32)


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
def _cut(cuts, query, there, missing, origin, length):
    """Return cuts relative to `origin` within 0 .. length, `missing` where there is no query."""
    found = tl.load(cuts + query, mask=there, other=0) - origin
    found = tl.minimum(tl.maximum(found, 0), length).to(tl.int32)
    return tl.where(there, found, missing)


@triton.jit
def _members(
    codes,
    skipped,
    GROUPS: tl.constexpr,
    BUCKETS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return `[COLUMNS, ROWS]`, whether codes `[ROWS, GROUPS]` are a bucket's, -1 of none.

    A product spreads codes over buckets as other products leave their results: without a word
    between threads.
    """
    column = skipped + tl.arange(0, COLUMNS)
    of_group = (column // BUCKETS)[:, None] == tl.arange(0, GROUPS)[None, :]
    spread = tl.dot(of_group.to(OPERAND), tl.trans(codes.to(OPERAND)), input_precision=PRECISION)
    return (spread == (column % BUCKETS).to(tl.float32)[:, None]).to(OPERAND)


@triton.jit
def _load_table(
    tables,
    offsets,
    user,
    rows,
    origin,
    lines,
    size: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return `[COLUMNS, SIZE]` float32, what is kept for the piece at `origin` of a user."""
    place = partial_of(offsets, user, rows, origin // TILE, TILE) * lines * size
    return load_rows(tables + place, tl.arange(0, COLUMNS), lines, size, SIZE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _walk(
    values,
    ids,
    items,
    offsets,
    packed,
    query_packed,
    query_offsets,
    cuts,
    tables,
    interest,
    users,
    rows,
    queries,
    skipped,
    lines,
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
    ADD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Answer queries from `lines` rows of tables behind the skipped, or add to answers (ADD)."""
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
    table = tl.zeros([COLUMNS, SIZE], tl.float32)
    if (origin > 0) & (rows > TILE):
        table = _load_table(tables, offsets, user, rows, origin, lines, size, SIZE, COLUMNS,
                            TILE)  # fmt: skip
    values, ids = behaviours_from(values, ids, begin, size)
    packed += begin * WORDS
    inner = tl.arange(0, LENGTH)
    column = tl.arange(0, SIZE)
    start = tl.cast(0, tl.int32)
    x_next = load_behaviours(values, ids, items, inner, length, size, SIZE)
    codes_next = load_codes(packed, inner, inner < length, GROUPS, BITS, TAU, WORDS, LENGTH)
    cut = _cut(cuts, query, query < behind_query, _NEVER, origin, length)
    while query < behind_query:
        stop = tl.minimum(start + LENGTH, tl.maximum(cut, start))
        added = (start + inner < stop)[:, None]
        x = tl.where(added, x_next, 0.0).to(OPERAND)
        codes = tl.where(added, codes_next, -1)
        row = stop + inner
        x_next = load_behaviours(values, ids, items, row, length, size, SIZE)
        codes_next = load_codes(packed, row, row < length, GROUPS, BITS, TAU, WORDS, LENGTH)
        member = _members(codes, skipped, GROUPS, BUCKETS, COLUMNS, OPERAND, PRECISION)
        table = tl.dot(member, x, table, input_precision=PRECISION)
        if cut <= stop:
            several = query + tl.arange(0, QUERIES)
            at = _cut(cuts, several, several < behind_query, _NEVER, origin, length)
            here = at <= stop
            wanted = load_wanted(
                query_packed, several, here, groups, GROUPS, BITS, TAU, WORDS, QUERIES
            )
            asked = _members(wanted, skipped, GROUPS, BUCKETS, COLUMNS, OPERAND, PRECISION)
            scale = inverse_norm(tl.sum(table * table, 1)) / groups
            unit = (table * scale[:, None]).to(OPERAND)
            mean_t = tl.dot(tl.trans(unit), asked, input_precision=PRECISION)
            target = interest + several[None, :] * size + column[:, None]
            mask = here[None, :] & (column < size)[:, None]
            if ADD:
                mean_t += tl.load(target, mask=mask, other=0.0)
            tl.store(target, mean_t, mask=mask)
            query += tl.sum(here.to(tl.int32), 0)
            cut = _cut(cuts, query, query < behind_query, _NEVER, origin, length)
        start = stop


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _walk_back(
    grad,
    values,
    ids,
    items,
    offsets,
    packed,
    query_packed,
    query_offsets,
    cuts,
    tables,
    laters,
    grad_values,
    users,
    rows,
    queries,
    skipped,
    lines,
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
    ADD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk back and store the behaviours' gradients, or without EMIT what a piece leaves behind.

    The latter is for users of several pieces, whose earlier pieces need it of all later ones. Of
    `lines` rows of tables, behind the skipped; with ADD gradients are added to those there are.
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
    values, ids = behaviours_from(values, ids, begin, size)
    grad_values += begin * size
    packed += begin * WORDS
    inner = tl.arange(0, LENGTH)
    table = tl.zeros([COLUMNS, SIZE], tl.float32)
    later = tl.zeros([COLUMNS, SIZE], tl.float32)
    if (alone == 0) & (rows > TILE):
        if origin > 0:
            table = _load_table(tables, offsets, user, rows, origin, lines, size, SIZE, COLUMNS,
                                TILE)  # fmt: skip
        if EMIT:
            later = _load_table(laters, offsets, user, rows, origin, lines, size, SIZE, COLUMNS,
                                TILE)  # fmt: skip
    for start in range(0, length, LENGTH):
        row = start + inner
        x = load_behaviours(values, ids, items, row, length, size, SIZE).to(OPERAND)
        codes = load_codes(packed, row, row < length, GROUPS, BITS, TAU, WORDS, LENGTH)
        member = _members(codes, skipped, GROUPS, BUCKETS, COLUMNS, OPERAND, PRECISION)
        table = tl.dot(member, x, table, input_precision=PRECISION)

    most = tl.sum(table * table, 1)
    minus = -table  # to which a product can add what is taken out
    query = behind_query - 1
    stop = length
    x_next, codes_next = _load_before(
        values, ids, items, packed, stop, size, GROUPS, BITS, TAU, WORDS, SIZE, LENGTH
    )
    cut = _cut(cuts, query, query >= low_query, -1, origin, length)
    while stop > 0:
        if cut >= stop:
            several = query - tl.arange(0, QUERIES)
            at = _cut(cuts, several, several >= low_query, -1, origin, length)
            here = at >= stop
            wanted = load_wanted(
                query_packed, several, here, groups, GROUPS, BITS, TAU, WORDS, QUERIES
            )
            asked = _members(wanted, skipped, GROUPS, BUCKETS, COLUMNS, OPERAND, PRECISION)
            upstream = tl.load(
                grad + several[:, None] * size + column[None, :],
                mask=here[:, None] & (column < size)[None, :],
                other=0.0,
            ).to(OPERAND)
            square = tl.sum(minus * minus, 1)
            most = tl.maximum(most, square)
            scale = tl.where(square > most * _NOTHING, inverse_norm(square), 0.0)
            weight = (scale / groups).to(OPERAND)
            products = tl.dot(minus.to(OPERAND), tl.trans(upstream), input_precision=PRECISION)
            along = tl.sum(asked.to(tl.float32) * products, 1)
            pulled = asked * weight[:, None]
            later = tl.dot(pulled, upstream, later, input_precision=PRECISION)
            later -= (weight.to(tl.float32) * (scale * along) * scale)[:, None] * minus
            query -= tl.sum(here.to(tl.int32), 0)
            cut = _cut(cuts, query, query >= low_query, -1, origin, length)
        if cut < stop:
            start = tl.maximum(tl.maximum(stop - LENGTH, cut), 0)
            row = stop - LENGTH + inner
            taken = (row >= start)[:, None]
            x = tl.where(taken, x_next, 0.0).to(OPERAND)
            codes = tl.where(taken, codes_next, -1)
            x_next, codes_next = _load_before(
                values, ids, items, packed, start, size, GROUPS, BITS, TAU, WORDS, SIZE, LENGTH
            )
            member = _members(codes, skipped, GROUPS, BUCKETS, COLUMNS, OPERAND, PRECISION)
            if EMIT:
                found_t = tl.dot(tl.trans(later.to(OPERAND)), member, input_precision=PRECISION)
                target = grad_values + row[None, :] * size + column[:, None]
                mask = (row >= start)[None, :] & (column < size)[:, None]
                if ADD:
                    found_t += tl.load(target, mask=mask, other=0.0).to(tl.float32)
                tl.store(target, found_t, mask=mask)
            minus = tl.dot(member, x, minus, input_precision=PRECISION)
            stop = start
    if not EMIT:
        place = partial_of(offsets, user, rows, origin // TILE, TILE) * lines * size
        inside = (line < lines)[:, None] & (column < size)[None, :]
        tl.store(laters + place + line[:, None] * size + column[None, :], later, mask=inside)


@triton.jit
def _load_before(
    values,
    ids,
    items,
    packed,
    stop,
    size: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    TAU: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Return the LENGTH behaviours before `stop` and their codes, zeros before the first."""
    row = stop - LENGTH + tl.arange(0, LENGTH)
    column = tl.arange(0, SIZE)
    if ids is None:
        mask = (row >= 0)[:, None] & (column < size)[None, :]
        x = tl.load(values + row[:, None] * size + column[None, :], mask=mask, other=0.0)
    else:
        x = gather_rows(values, ids, items, row, row >= 0, size, SIZE)
    return x, load_codes(packed, row, row >= 0, GROUPS, BITS, TAU, WORDS, LENGTH)


@triton.jit
def _accumulate(
    offsets, tables, rows, width, TILE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr
):
    """Replace a user's sums by piece by those of all pieces before, or with REVERSE behind."""
    user = tl.program_id(0).to(tl.int64)
    begin, end = span(offsets, user, rows)
    pieces = (end - begin + TILE - 1) // TILE
    if pieces <= 1:
        return
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < width
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(0, pieces):
        index = pieces - 1 - step if REVERSE else step
        place = tables + partial_of(offsets, user, rows, index, TILE) * width + element
        own = tl.load(place, mask=inside, other=0.0)
        tl.store(place, total, mask=inside)
        total += own


def attend_at(
    values: Tensor,
    offsets: Tensor,
    packed: Tensor,
    query_packed: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    packing: Packing,
    ids: Tensor | None = None,
) -> Tensor:
    """Return the interests `[Q, D]` in the dtype of the values."""
    rows, size = packed.shape[0], values.shape[1]
    queries, users = cuts.shape[0], offsets.shape[0] - 1
    shares = _shares(packing, size)
    interest = values.new_empty(queries, size, dtype=_sums_dtype(values, shares))
    if queries == 0:
        return interest.to(values.dtype)
    for skipped, lines in shares:
        tables = _tables(values, ids, offsets, packed, packing, skipped, lines)
        _walk[(slots(users, rows, TILE),)](
            values, ids, values.shape[0], offsets, packed, query_packed, query_offsets, cuts,
            tables, interest, users, rows, queries, skipped, lines, size, packing.groups,
            ADD=skipped > 0, **_code(packing, size, values.dtype), **_shape(size),
        )  # fmt: skip
    return interest.to(values.dtype)


def attend_at_backward(
    grad: Tensor,
    values: Tensor,
    offsets: Tensor,
    packed: Tensor,
    query_packed: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    packing: Packing,
    ids: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the behaviours `[N, D]` in their dtype."""
    rows, size = packed.shape[0], values.shape[1]
    queries, users = cuts.shape[0], offsets.shape[0] - 1
    shares = _shares(packing, size)
    out = values.new_empty(rows, size, dtype=_sums_dtype(values, shares))
    if out.numel() == 0:
        return out.to(values.dtype)
    grid = (slots(users, rows, TILE),)
    for skipped, lines in shares:
        tables = _tables(values, ids, offsets, packed, packing, skipped, lines)
        laters = torch.empty_like(tables)
        walk_back = partial(
            _walk_back[grid],
            grad, values, ids, values.shape[0], offsets, packed, query_packed, query_offsets, cuts,
            tables, laters, out, users, rows, queries, skipped, lines, size, packing.groups,
            ADD=skipped > 0, **_code(packing, size, values.dtype), **_shape(size),
        )  # fmt: skip
        if rows > TILE:
            walk_back(EMIT=False)
            _add_up(laters, offsets, rows, reverse=True)
        walk_back(EMIT=True)
    return out.to(values.dtype)


def _columns(size: int) -> int:
    """Return how many rows of a table a program holds."""
    return 128 if size <= 128 else 64


def _shares(packing: Packing, size: int) -> list[tuple[int, int]]:
    """Return how many rows of a table each walk skips, and how many it takes."""
    rows, columns = packing.groups << packing.tau, _columns(size)
    return [(skipped, min(columns, rows - skipped)) for skipped in range(0, rows, columns)]


def _sums_dtype(values: Tensor, shares: list[tuple[int, int]]) -> torch.dtype:
    return values.dtype if len(shares) == 1 else torch.float32


def _tables(
    values: Tensor,
    ids: Tensor | None,
    offsets: Tensor,
    packed: Tensor,
    packing: Packing,
    skipped: int,
    lines: int,
) -> Tensor:
    """Return rows of the tables at the begin of each piece of users who have several."""
    rows = packed.shape[0]
    if rows <= TILE:
        return values.new_empty(0, dtype=torch.float32)
    tables = pieces_of_tables(values, offsets, packed, packing, TILE, skipped, lines, ids)
    _add_up(tables, offsets, rows, reverse=False)
    return tables


def _add_up(tables: Tensor, offsets: Tensor, rows: int, reverse: bool) -> None:
    width, block = tables.shape[1], 1024
    _accumulate[offsets.shape[0] - 1, triton.cdiv(width, block)](
        offsets, tables, rows, width, TILE=TILE, BLOCK=block, REVERSE=reverse, num_warps=4
    )


def _code(packing: Packing, size: int, dtype: torch.dtype) -> dict[str, object]:
    exact = interpreted() or dtype != torch.bfloat16
    return {
        "TAU": packing.tau,
        "BITS": packing.bits,
        "GROUPS": packing.padded_groups,
        "WORDS": packing.words,
        "SIZE": padded_size(size),
        "COLUMNS": min(packing.padded_groups << packing.tau, _columns(size)),
        "QUERIES": 16,
        "TILE": TILE,
        "OPERAND": tl.float32 if exact else tl.bfloat16,
        "PRECISION": "ieee" if interpreted() else "tf32",
    }


def _shape(size: int) -> dict[str, int]:
    if interpreted():
        return {"LENGTH": 16, "num_warps": 4}
    return {"LENGTH": 32, "num_warps": 4 if size <= 64 else 8}
