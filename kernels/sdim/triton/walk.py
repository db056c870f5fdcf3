"""Queries at cuts by walks over each history, for small tables.

A walk keeps a user's table in registers, or 128 rows of a larger one; the walks add to each other.
It adds behaviours in blocks, by products with their one-hot codes, up to the next cut; there one
product of the sums with the candidates' codes over norms answers all of a request. So time
grows with behaviours plus requests. A program takes a piece of a user; where earlier pieces end,
tables come from their sums.

Backward walks in reverse, and takes behaviours out of the table again. All candidates of a request
share the sums S that it met: the gradient of a bucket is `(U - (u . U) u) / (G |S|)`, u = S / |S|,
U the sum of the gradients of the candidates in it. A behaviour collects those of later requests.

Where queries see the latest `last` behaviours only, the table loses one behaviour for each that it
gains, and a behaviour collects what requests after it give, less what those give that see it no
more. A walk of its own stores the latter before.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashtab.kernels.core.dispatch import interpreted
from hashtab.kernels.core.tiles import UNSPECIALIZED, first_above, slots, span
from hashtab.kernels.core.tuning import LaunchShape, launch_shape
from hashtab.kernels.sdim.packing import Packing, walk_rows
from hashtab.kernels.sdim.triton.encode import sums_before_last
from hashtab.kernels.sdim.triton.hashing import load_codes, load_wanted
from hashtab.kernels.sdim.triton.rows import gather_rows, load_rows, padded_size
from hashtab.kernels.sdim.triton.sums import inverse_norm, piece, place_of

TILE = 2048  # rows of a piece
NO_LIMIT = 2**62  # to the latest behaviours that a query sees
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
def _inverse_norm_of_sums(square, most):
    """Return 1 / sqrt(square), 0 where that is rounding left by what was taken out."""
    return tl.where(square > most * _NOTHING, inverse_norm(square), 0.0)


@triton.jit
def _members(
    codes,
    skipped,
    GROUPS: tl.constexpr,
    BUCKETS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Return `[COLUMNS, ROWS]`, whether codes `[ROWS, GROUPS]` are a bucket's, -1 of none.

    A product spreads codes over buckets as other products leave their results: without a word
    between threads.
    """
    column = skipped + tl.arange(0, COLUMNS)
    of_group = (column // BUCKETS)[:, None] == tl.arange(0, GROUPS)[None, :]
    spread = tl.dot(of_group.to(OPERAND), tl.trans(codes.to(OPERAND)))
    return (spread == (column % BUCKETS).to(tl.float32)[:, None]).to(OPERAND)


@triton.jit
def _load_behaviours(
    values,
    ids,
    items,
    packed,
    row,
    there,
    size: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    TAU: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Return behaviours `[LENGTH, SIZE]` and their codes, zeros where they are not there."""
    if ids is None:
        column = tl.arange(0, SIZE)
        mask = there[:, None]
        if size != SIZE:
            mask = mask & (column < size)[None, :]
        x = tl.load(values + row[:, None] * size + column[None, :], mask=mask, other=0.0)
    else:
        x = gather_rows(values, ids, items, row, there, size, SIZE)
    return x, load_codes(packed, row, there, GROUPS, BITS, TAU, WORDS, LENGTH)


@triton.jit
def _add_range(
    table,
    values,
    ids,
    items,
    packed,
    begin,
    end,
    skipped,
    size: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    TAU: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Return `table` plus the behaviours from `begin` up to `end`."""
    for start in range(begin, end, LENGTH):
        row = start + tl.arange(0, LENGTH)
        x, codes = _load_behaviours(
            values, ids, items, packed, row, row < end, size, GROUPS, BITS, TAU, WORDS, SIZE, LENGTH
        )
        member = _members(codes, skipped, GROUPS, 1 << TAU, COLUMNS, OPERAND)
        table = tl.dot(member, x.to(OPERAND), table)
    return table


@triton.jit
def _load_table(
    tables,
    offsets,
    user,
    rows,
    index,
    lines,
    size: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return `[COLUMNS, SIZE]` float32, what is kept where a user's piece ends, not the last."""
    place = place_of(offsets, user, rows, index, TILE) * lines * size
    return load_rows(tables + place, tl.arange(0, COLUMNS), lines, size, SIZE)


@triton.jit
def _table_before(
    tables,
    values,
    ids,
    items,
    packed,
    offsets,
    user,
    rows,
    origin,
    low,
    skipped,
    lines,
    size: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    TAU: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    LIMITED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Return the sums of a user's behaviours before the piece at `origin`, if LIMITED from `low`.

    `tables` hold that where a piece ends. If LIMITED, they hold each piece's own sums; those from
    `low` on are added, and the behaviours of the piece that `low` cuts apart. `values` (or `ids`)
    and `packed` begin with the piece.
    """
    if not LIMITED:
        return _load_table(
            tables, offsets, user, rows, origin // TILE - 1, lines, size, SIZE, COLUMNS, TILE
        )
    table = tl.zeros([COLUMNS, SIZE], tl.float32)
    whole = tl.minimum((low + TILE - 1) // TILE, origin // TILE)  # more if offsets are wrong
    for index in range(whole, origin // TILE):
        table += _load_table(tables, offsets, user, rows, index, lines, size, SIZE, COLUMNS, TILE)
    return _add_range(
        table, values, ids, items, packed, low - origin, whole * TILE - origin, skipped, size,
        GROUPS, BITS, TAU, WORDS, SIZE, COLUMNS, LENGTH, OPERAND,
    )  # fmt: skip


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
    last,
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
    LIMITED: tl.constexpr,
    ADD: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Answer queries from `lines` rows of tables behind the skipped, or add to answers (ADD).

    If LIMITED, a query sees the latest `last` behaviours before its cut.
    """
    user, begin, end, alone = piece(offsets, users, rows, TILE)
    if (begin >= end) & (alone == 0):
        return
    first, behind = span(offsets, user, rows)
    origin = begin - first
    last = tl.cast(last, tl.int64)
    query, behind_query = _queries_of_piece(
        cuts, query_offsets, user, queries, origin, end - first, begin == first, end == behind
    )
    if query >= behind_query:
        return
    BUCKETS: tl.constexpr = 1 << TAU
    length = tl.cast(end - begin, tl.int32)
    if ids is None:
        values += begin * size
    else:
        ids += begin
    packed += begin * WORDS
    table = tl.zeros([COLUMNS, SIZE], tl.float32)
    if (origin > 0) & (rows > TILE):
        table = _table_before(
            tables, values, ids, items, packed, offsets, user, rows, origin,
            tl.maximum(origin - last, 0), skipped, lines, size, GROUPS, BITS, TAU, WORDS, SIZE,
            COLUMNS, TILE, LENGTH, LIMITED, OPERAND,
        )  # fmt: skip
    most = tl.zeros([COLUMNS], tl.float32)
    inner = tl.arange(0, LENGTH)
    column = tl.arange(0, SIZE)
    start = tl.cast(0, tl.int32)
    x_next, codes_next = _load_behaviours(
        values, ids, items, packed, inner, inner < length, size, GROUPS, BITS, TAU, WORDS, SIZE,
        LENGTH,
    )  # fmt: skip
    several = query + tl.arange(0, QUERIES)
    there = several < behind_query
    # Loaded before they are met, for loads take long.
    at = _cut(cuts, several, there, _NEVER, origin, length)
    wanted = load_wanted(query_packed, several, there, groups, GROUPS, BITS, TAU, WORDS, QUERIES)
    cut = tl.min(at, 0)
    while query < behind_query:
        stop = tl.minimum(start + LENGTH, tl.maximum(cut, start))
        row = start + inner
        x = tl.where((row < stop)[:, None], x_next, 0.0).to(OPERAND)
        member = _members(codes_next, skipped, GROUPS, BUCKETS, COLUMNS, OPERAND)
        after = stop + inner
        x_next, codes_next = _load_behaviours(
            values, ids, items, packed, after, after < length, size, GROUPS, BITS, TAU, WORDS, SIZE,
            LENGTH,
        )  # fmt: skip
        table = tl.dot(member, x, table)
        if LIMITED and origin + stop > last:
            most = tl.maximum(most, tl.sum(table * table, 1))
            x, codes = _load_behaviours(
                values, ids, items, packed, row - last, (row < stop) & (origin + row >= last), size,
                GROUPS, BITS, TAU, WORDS, SIZE, LENGTH,
            )  # fmt: skip
            member = _members(codes, skipped, GROUPS, BUCKETS, COLUMNS, OPERAND)
            table = tl.dot(member, -x.to(OPERAND), table)
        if cut <= stop:
            here = at <= stop
            asked = _members(
                tl.where(here[:, None], wanted, -1), skipped, GROUPS, BUCKETS, COLUMNS, OPERAND
            )
            scale = _inverse_norm_of_sums(tl.sum(table * table, 1), most) / groups
            # Scaling the codes is less work than scaling the table, and a little less exact.
            mean_t = tl.dot(tl.trans(table.to(OPERAND)), asked * scale.to(OPERAND)[:, None])
            target = interest + several[None, :] * size + column[:, None]
            mask = here[None, :] & (column < size)[:, None]
            if ADD:
                mean_t += tl.load(target, mask=mask, other=0.0)
            tl.store(target, mean_t, mask=mask)
            answered = tl.sum(here.to(tl.int32), 0)
            query += answered
            cut = tl.min(tl.where(here, _NEVER, at), 0)
            several = query + tl.arange(0, QUERIES)
            there = several < behind_query
            at = _cut(cuts, several, there, _NEVER, origin, length)
            wanted = load_wanted(
                query_packed, several, there, groups, GROUPS, BITS, TAU, WORDS, QUERIES
            )
            if answered == QUERIES:
                cut = tl.min(at, 0)
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
    last,
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
    LIMITED: tl.constexpr,
    EMIT: tl.constexpr,
    FALLEN: tl.constexpr,
    ADD: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Walk back and store the behaviours' gradients, or without EMIT what a piece leaves behind.

    The latter is for users of several pieces, whose earlier pieces need it of all later ones. Of
    `lines` rows of tables, behind the skipped; with ADD gradients are added to those there are.

    If LIMITED, FALLEN comes first and stores what a behaviour loses to requests that see it no
    more, and the others add to that.
    """
    user, begin, end, alone = piece(offsets, users, rows, TILE)
    if begin >= end:
        return
    first, behind = span(offsets, user, rows)
    if (EMIT == 0) & (begin == first):
        return
    origin = begin - first
    last = tl.cast(last, tl.int64)
    if FALLEN and behind - first <= last:
        return
    low_query, behind_query = _queries_of_piece(
        cuts, query_offsets, user, queries, origin, end - first, begin == first, end == behind
    )
    BUCKETS: tl.constexpr = 1 << TAU
    length = tl.cast(end - begin, tl.int32)
    column, line = tl.arange(0, SIZE), tl.arange(0, COLUMNS)
    if ids is None:
        values += begin * size
    else:
        ids += begin
    grad_values += begin * size
    packed += begin * WORDS
    inner = tl.arange(0, LENGTH)
    table = tl.zeros([COLUMNS, SIZE], tl.float32)
    later = tl.zeros([COLUMNS, SIZE], tl.float32)
    low = tl.maximum(end - first - last, 0) if LIMITED else tl.cast(0, tl.int64)
    if (alone == 0) & (rows > TILE):
        if origin > 0:
            table = _table_before(
                tables, values, ids, items, packed, offsets, user, rows, origin,
                tl.minimum(low, origin), skipped, lines, size, GROUPS, BITS, TAU, WORDS, SIZE,
                COLUMNS, TILE, LENGTH, LIMITED, OPERAND,
            )  # fmt: skip
        if EMIT and end < behind:
            later = _load_table(
                laters, offsets, user, rows, origin // TILE, lines, size, SIZE, COLUMNS, TILE
            )
    table = _add_range(
        table, values, ids, items, packed, tl.cast(tl.maximum(low - origin, 0), tl.int32), length,
        skipped, size, GROUPS, BITS, TAU, WORDS, SIZE, COLUMNS, LENGTH, OPERAND,
    )  # fmt: skip

    most = tl.sum(table * table, 1)
    minus = -table  # to which a product can add what is taken out
    query = behind_query - 1
    stop = length
    row = stop - LENGTH + inner
    x_next, codes_next = _load_behaviours(
        values, ids, items, packed, row, row >= 0, size, GROUPS, BITS, TAU, WORDS, SIZE, LENGTH
    )
    several = query - tl.arange(0, QUERIES)
    at = _cut(cuts, several, several >= low_query, -1, origin, length)
    cut = tl.max(at, 0)
    while stop > 0:
        if cut >= stop:
            here = at >= stop
            there = several >= low_query
            wanted = load_wanted(
                query_packed, several, there, groups, GROUPS, BITS, TAU, WORDS, QUERIES
            )
            upstream = tl.load(
                grad + several[:, None] * size + column[None, :],
                mask=there[:, None] & (column < size)[None, :],
                other=0.0,
            ).to(OPERAND)
            asked = _members(
                tl.where(here[:, None], wanted, -1), skipped, GROUPS, BUCKETS, COLUMNS, OPERAND
            )
            most = tl.maximum(most, tl.sum(minus * minus, 1))
            later = _add_request(later, minus, most, asked, upstream, groups, OPERAND)
            answered = tl.sum(here.to(tl.int32), 0)
            query -= answered
            cut = tl.max(tl.where(here, -1, at), 0)
            several = query - tl.arange(0, QUERIES)
            at = _cut(cuts, several, several >= low_query, -1, origin, length)
            if answered == QUERIES:
                cut = tl.max(at, 0)
        if cut < stop:
            start = tl.maximum(tl.maximum(stop - LENGTH, cut), 0)
            row = stop - LENGTH + inner
            x = tl.where((row >= start)[:, None], x_next, 0.0).to(OPERAND)
            member = _members(codes_next, skipped, GROUPS, BUCKETS, COLUMNS, OPERAND)
            before = start - LENGTH + inner
            x_next, codes_next = _load_behaviours(
                values, ids, items, packed, before, before >= 0, size, GROUPS, BITS, TAU, WORDS,
                SIZE, LENGTH,
            )  # fmt: skip
            minus = tl.dot(member, x, minus)
            if LIMITED and origin + stop > last:
                seen_no_more = (row >= start) & (origin + row >= last)
                x, codes = _load_behaviours(
                    values, ids, items, packed, row - last, seen_no_more, size, GROUPS, BITS, TAU,
                    WORDS, SIZE, LENGTH,
                )  # fmt: skip
                back = _members(codes, skipped, GROUPS, BUCKETS, COLUMNS, OPERAND)
                minus = tl.dot(back, -x.to(OPERAND), minus)
                most = tl.maximum(most, tl.sum(minus * minus, 1))
                if FALLEN:
                    found_t = -_collect(later, back, LIMITED, OPERAND)
                    _store_gradients(
                        grad_values, found_t, row - last, seen_no_more, seen_no_more, size,
                        SIZE, ADD,
                    )  # fmt: skip
            if EMIT and not FALLEN:
                found_t = _collect(later, member, LIMITED, OPERAND)
                there = row >= start
                stored = there
                if LIMITED and not ADD:
                    stored = there & (begin + row + last < behind)
                _store_gradients(
                    grad_values, found_t, row, there, stored, size, SIZE, ADD or LIMITED
                )
            stop = start
    if not EMIT:
        place = place_of(offsets, user, rows, origin // TILE - 1, TILE) * lines * size
        inside = (line < lines)[:, None] & (column < size)[None, :]
        tl.store(laters + place + line[:, None] * size + column[None, :], later, mask=inside)


@triton.jit
def _add_request(later, minus, most, asked, upstream, groups: tl.constexpr, OPERAND: tl.constexpr):
    """Return `later` plus the gradients of the buckets' sums by the queries of a request.

    Args:
        later: `[COLUMNS, SIZE]` float32.
        minus: `[COLUMNS, SIZE]` float32, the sums that the request met, negated.
        most: `[COLUMNS]`, the most that the sums' squares have been.
        asked: `[COLUMNS, QUERIES]`, whether queries ask for a bucket.
        upstream: `[QUERIES, SIZE]`, the gradients of interests.
        groups: G.
        OPERAND: type of the factors of products.
    """
    scale = _inverse_norm_of_sums(tl.sum(minus * minus, 1), most)
    weight = (scale / groups).to(OPERAND)
    products = tl.dot(minus.to(OPERAND), tl.trans(upstream))
    along = tl.sum(asked.to(tl.float32) * products, 1)
    later = tl.dot(asked * weight[:, None], upstream, later)
    return later - (weight.to(tl.float32) * (scale * along) * scale)[:, None] * minus


@triton.jit
def _collect(later, member, LIMITED: tl.constexpr, OPERAND: tl.constexpr):
    """Return `[SIZE, LENGTH]`: what behaviours collect of `later` `[COLUMNS, SIZE]`.

    If LIMITED with twice the digits, for most of them are lost where a difference is small.
    """
    high = later.to(OPERAND)
    if not LIMITED:
        return tl.dot(tl.trans(high), member)
    low = (later - high.to(tl.float32)).to(OPERAND)
    found_t = tl.dot(tl.trans(low), member)
    return tl.dot(tl.trans(high), member, found_t)


@triton.jit
def _store_gradients(
    grad_values,
    found_t,
    row,
    there,
    stored,
    size: tl.constexpr,
    SIZE: tl.constexpr,
    ADD: tl.constexpr,
):
    """Store `[SIZE, LENGTH]` as rows that are there, with ADD plus what is stored of them."""
    column = tl.arange(0, SIZE)
    target = grad_values + row[None, :] * size + column[:, None]
    within = (column < size)[:, None]
    if ADD:
        found_t += tl.load(target, mask=stored[None, :] & within, other=0.0).to(tl.float32)
    tl.store(target, found_t, mask=there[None, :] & within)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _accumulate(
    offsets, tables, rows, width, TILE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr
):
    """Make what is kept where a user's piece ends the sum up to it, or with REVERSE from it on."""
    user = tl.program_id(0).to(tl.int64)
    begin, end = span(offsets, user, rows)
    pieces = (end - begin + TILE - 1) // TILE
    if pieces <= 1:
        return
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < width
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(0, pieces - 1):
        index = pieces - 2 - step if REVERSE else step
        place = tables + place_of(offsets, user, rows, index, TILE) * width + element
        total += tl.load(place, mask=inside, other=0.0)
        tl.store(place, total, mask=inside)


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
    rows, size = packed.shape[0], values.shape[1]
    queries, users = cuts.shape[0], offsets.shape[0] - 1
    shares, limited = _shares(packing, size), last < NO_LIMIT
    dtype = values.dtype if len(shares) == 1 else torch.float32
    interest = values.new_empty(queries, size, dtype=dtype)
    if queries == 0:
        return interest.to(values.dtype)
    for share in shares:
        tables = _tables(values, ids, offsets, packed, packing, share, limited)
        _walk[(slots(users, rows, TILE),)](
            values, ids, values.shape[0], offsets, packed, query_packed, query_offsets, cuts,
            tables, interest, users, rows, queries, last, *share, size, packing.groups,
            **_code(packing, size, share, limited),
            **_shape(values, packing, back=False, limited=limited),
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
    last: int,
    ids: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the behaviours `[N, D]` in their dtype."""
    rows, size = packed.shape[0], values.shape[1]
    queries, users = cuts.shape[0], offsets.shape[0] - 1
    shares, limited = _shares(packing, size), last < NO_LIMIT
    dtype = values.dtype if len(shares) == 1 and not limited else torch.float32
    out = values.new_empty(rows, size, dtype=dtype)
    if out.numel() == 0:
        return out.to(values.dtype)
    grid = (slots(users, rows, TILE),)
    for share in shares:
        tables = _tables(values, ids, offsets, packed, packing, share, limited)
        laters = torch.empty_like(tables)
        walk_back = partial(
            _walk_back[grid],
            grad, values, ids, values.shape[0], offsets, packed, query_packed, query_offsets, cuts,
            tables, laters, out, users, rows, queries, last, *share, size, packing.groups,
            **_code(packing, size, share, limited),
            **_shape(values, packing, back=True, limited=limited),
        )  # fmt: skip
        if rows > TILE:
            walk_back(EMIT=False, FALLEN=False)
            _add_up(laters, offsets, rows, reverse=True)
        if limited:
            walk_back(EMIT=True, FALLEN=True)
        walk_back(EMIT=True, FALLEN=False)
    return out.to(values.dtype)


class _Share(NamedTuple):
    """Rows of a table that a walk takes: how many, and how many it skips before them."""

    skipped: int
    lines: int


def _shares(packing: Packing, size: int) -> list[_Share]:
    rows, columns = packing.groups << packing.tau, walk_rows(size)
    return [_Share(skipped, min(columns, rows - skipped)) for skipped in range(0, rows, columns)]


def _tables(
    values: Tensor,
    ids: Tensor | None,
    offsets: Tensor,
    packed: Tensor,
    packing: Packing,
    share: _Share,
    limited: bool,
) -> Tensor:
    """Return rows of tables, as `_table_before` reads them, of users who have several pieces."""
    rows = packed.shape[0]
    if rows <= TILE:
        return values.new_empty(0, dtype=torch.float32)
    tables = sums_before_last(values, offsets, packed, packing, TILE, *share, ids)
    if not limited:
        _add_up(tables, offsets, rows, reverse=False)
    return tables


def _add_up(tables: Tensor, offsets: Tensor, rows: int, reverse: bool) -> None:
    width, block = tables.shape[1], 1024
    _accumulate[offsets.shape[0] - 1, triton.cdiv(width, block)](
        offsets, tables, rows, width, TILE=TILE, BLOCK=block, REVERSE=reverse, num_warps=4
    )


def _code(packing: Packing, size: int, share: _Share, limited: bool) -> dict[str, object]:
    return {
        "TAU": packing.tau,
        "BITS": packing.bits,
        "GROUPS": packing.padded_groups,
        "WORDS": packing.words,
        "SIZE": padded_size(size),
        "COLUMNS": min(packing.padded_rows, walk_rows(size)),
        "QUERIES": 16,
        "TILE": TILE,
        "LIMITED": limited,
        "ADD": share.skipped > 0,
        "OPERAND": tl.float32 if interpreted() else tl.bfloat16,
    }


def _shape(values: Tensor, packing: Packing, *, back: bool, limited: bool) -> LaunchShape:
    size, table = values.shape[1], min(packing.padded_rows, walk_rows(values.shape[1]))
    # For many groups 4 warps spill backward; and of a table of 64 rows 8 warps take more
    # descriptors than ptxas (CUDA 12.8) holds, forward and over the latest 32 rows backward.
    few = size <= 64
    if packing.padded_groups > 16:
        few = not back and (few or table <= 64)
    short = back and (size > 128 or (limited and (size > 32 or packing.padded_groups > 16)))
    rule = {"LENGTH": 16 if short else 32, "num_warps": 4 if few else 8}
    name = ("walk_back" if back else "walk") + (" the last" if limited else "")
    sizes = (padded_size(size), table, packing.padded_groups)
    return launch_shape(name, values.device, values.dtype, *sizes, rule=rule)
