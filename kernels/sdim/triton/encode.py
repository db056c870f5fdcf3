"""Behaviours to bucket tables: hash, members of buckets and their sums in one read of the history.

A program makes the sums of some rows of a table. Where a table has more, behaviours are hashed once
before, and several programs read them, from the GPU's cache; wide behaviours are hashed before too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashtab.kernels.core import dispatch
from hashtab.kernels.core.tiles import UNSPECIALIZED, slots, span
from hashtab.kernels.core.tuning import LaunchShape, launch_shape
from hashtab.kernels.sdim.packing import Packing
from hashtab.kernels.sdim.triton.hashing import (
    codes_of,
    hashes_within,
    load_codes,
    load_parts,
    pack,
    pack_codes,
    positive,
    prepare,
    products_of,
)
from hashtab.kernels.sdim.triton.rows import (
    load_behaviours,
    padded_size,
    store_rows,
)
from hashtab.kernels.sdim.triton.sums import (
    LEAST_HASHED,
    add_products,
    code_factor,
    collect,
    columns_at_once,
    columns_of_table,
    holds,
    members,
    members_of_rows,
    most_rows,
    partial_of,
    partial_sums,
    parts,
    piece,
    place_of,
    spread_groups,
    sum_of_pieces,
)

TILE = 4096  # rows of a piece; their partial sums are a sixteenth of them at 128 rows of a table


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _encode(
    values,
    ids,
    items,
    offsets,
    prepared,
    table,
    packed,
    partial,
    users,
    rows,
    skipped,
    lines: tl.constexpr,
    size: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    HASH: tl.constexpr,
    WITH_LAST: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum a piece of a user into `lines` rows of a table, behind those that are skipped.

    Users' last pieces are left out unless wanted (WITH_LAST).
    """
    user, begin, end, alone = piece(offsets, users, rows, TILE)
    if (begin >= end) & (alone == 0):
        return
    first, behind = span(offsets, user, rows)
    if (WITH_LAST == 0) & (end == behind):
        return
    width = tl.cast(lines, tl.int64) * size
    index = (begin - first) // TILE
    if WITH_LAST:
        place = partial_of(offsets, user, rows, index, TILE)
    else:
        place = place_of(offsets, user, rows, index, TILE)
    target = tl.where(alone, table + user * width, partial + place * width)
    BUCKETS: tl.constexpr = 1 << TAU
    first_line = tl.program_id(1) * COLUMNS
    if ids is None:
        values += begin * size
    else:
        ids += begin
    packed += begin * WORDS
    length = tl.cast(end - begin, tl.int32)
    if HASH:
        high, middle, low = load_parts(
            prepared, 0, SIZE, BITS, GROUPS, GROUPS, values.dtype.element_ty, PRODUCTS, PARTS == 0
        )
    of_group, wanted = columns_of_table(skipped + first_line, COLUMNS, GROUPS, BUCKETS, PARTS == 0)
    sums = tl.zeros([COLUMNS, SIZE], tl.float32)
    # At least once: if sums could come from no product, ptxas would make one wait for the other.
    for start in tl.range(0, tl.maximum(length, 1), LENGTH, num_stages=STAGES):
        row = start + tl.arange(0, LENGTH)
        x = load_behaviours(values, ids, items, row, length, size, SIZE)
        if HASH:
            above = positive(x, high, middle, low, PRODUCTS, PARTS == 0)
            codes = codes_of(above, LENGTH, GROUPS, BITS)
            store_rows(packed, row, length, pack(codes, LENGTH, GROUPS, BITS), WORDS, WORDS)
        else:
            codes = load_codes(packed, row, row < length, GROUPS, BITS, TAU, WORDS, LENGTH)
        codes = code_factor(codes, LENGTH, GROUPS, PARTS == 0)
        member = members(of_group, codes, wanted, x.dtype, PARTS == 0)
        sums = add_products(sums, member, x, PARTS)

    store_rows(target, first_line + tl.arange(0, COLUMNS), lines, sums, size, SIZE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _add_pieces(offsets, partial, table, rows, width, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Add the pieces of a user who has several."""
    user = tl.program_id(0).to(tl.int64)
    begin, end = span(offsets, user, rows)
    pieces = (end - begin + TILE - 1) // TILE
    if pieces <= 1:
        return
    element = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < width
    total = sum_of_pieces(partial, offsets, user, rows, width, element, inside, pieces, TILE, 8)
    tl.store(table + user * width + element, total, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _encode_backward(
    grad_table,
    offsets,
    packed,
    grad_values,
    users,
    rows,
    size: tl.constexpr,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Collect the rows of small tables, `[GROUPS << TAU, SIZE]` in one program's memory.

    With HALF as float16 numbers of the size of the user's largest in a column: to bfloat16 as good
    as exact ones, but for what is below 1e-5 of that.
    """
    user, begin, end, _ = piece(offsets, users, rows, TILE)
    if begin >= end:
        return
    BUCKETS: tl.constexpr = 1 << TAU
    column, line = tl.arange(0, SIZE), tl.arange(0, GROUPS * BUCKETS)
    width = tl.cast(groups, tl.int64) * BUCKETS * size
    inside = (line < groups * BUCKETS)[:, None] & (column < size)[None, :]
    address = user * width + line[:, None] * size + column[None, :]
    grad_sums = tl.load(grad_table + address, mask=inside, other=0.0)
    if HALF:
        most = tl.max(tl.abs(grad_sums), 0)
        scale = tl.where(most > 0, most, 1.0)[None, :]
        half = (grad_sums / scale).to(tl.float16)
    of_group, wanted = columns_of_table(0, GROUPS * BUCKETS, GROUPS, BUCKETS, PARTS == 0)
    grad_values += begin * size
    packed += begin * WORDS
    length = tl.cast(end - begin, tl.int32)
    for start in tl.range(0, length, LENGTH, num_stages=STAGES):
        row = start + tl.arange(0, LENGTH)
        codes = load_codes(packed, row, row < length, GROUPS, BITS, TAU, WORDS, LENGTH)
        codes = code_factor(codes, LENGTH, GROUPS, PARTS == 0)
        if HALF:
            member = members_of_rows(codes, of_group, wanted, tl.float16, PARTS == 0)
            found = tl.dot(member.to(tl.float16), half) * scale
        else:
            member = members_of_rows(codes, of_group, wanted, tl.bfloat16, PARTS == 0)
            found = collect(member, grad_sums, PARTS)
        store_rows(grad_values, row, length, found, size, SIZE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _gather_backward(
    grad_table,
    offsets,
    packed,
    grad_values,
    users,
    rows,
    size: tl.constexpr,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Collect the rows of tables of any size, one group after the other."""
    user, begin, end, _ = piece(offsets, users, rows, TILE)
    column = tl.arange(0, SIZE)
    for start in range(begin, end, LENGTH):
        row = start + tl.arange(0, LENGTH)
        mask = (row < end)[:, None] & (column < size)[None, :]
        total = tl.zeros([LENGTH, SIZE], tl.float32)
        for group in range(groups):
            bit = group * BITS
            word = tl.load(packed + row * WORDS + bit // 32, mask=row < end, other=0)
            code = (word >> (bit % 32)) & ((1 << TAU) - 1)
            line = ((user * groups + group) << TAU) + code
            address = line[:, None] * size + column[None, :]
            total += tl.load(grad_table + address, mask=mask, other=0.0)
        tl.store(grad_values + row[:, None] * size + column[None, :], total, mask=mask)


def _columns(packing: Packing, values: Tensor) -> int:
    """Return how many rows of a table a program sums, 16 at least, as a product takes them."""
    most = 64 if _is_wide(values) else columns_at_once(values)
    return max(16, min(packing.padded_rows, most))


def _is_wide(values: Tensor) -> bool:
    """Return whether registers hold sums of 64 rows alone, and no products of a hash besides."""
    most = 64 if values.dtype == torch.float32 else 128
    return values.shape[1] > most and not dispatch.before_hopper(values)


def blocks_of(packing: Packing, values: Tensor) -> int:
    """Return how many programs share the rows of a user's table of sums of `values` `[N, D]`."""
    return int(triton.cdiv(packing.groups << packing.tau, _columns(packing, values)))


def reads_once(packing: Packing, values: Tensor) -> bool:
    """Return whether one program makes a user's table, and hashes within."""
    once = blocks_of(packing, values) == 1 and hashes_within(packing, values)
    return once and not _is_wide(values)


def encode(
    values: Tensor, offsets: Tensor, planes: Tensor, tau: int, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the table `[B, G, 2**tau, D]` float32 and the packed codes `[N, words]`."""
    rows, size = (values if ids is None else ids).shape[0], values.shape[1]
    users = offsets.shape[0] - 1
    packing = Packing(tau, planes.shape[1] // tau)
    table = values.new_empty(users, packing.groups, 2**tau, size, dtype=torch.float32)
    columns, fused = _columns(packing, values), reads_once(packing, values)
    products = products_of(planes, values.dtype)
    prepared = prepare(planes, packing, values.dtype) if fused else planes
    if fused:
        packed = torch.empty(rows, packing.words, dtype=torch.int32, device=values.device)
    else:
        packed = pack_codes(values, planes, tau, ids=ids)
    if users == 0:
        return table, packed
    width = packing.groups * 2**tau * size
    partial = partial_sums(rows, TILE, width, values)
    _encode[slots(users, rows, TILE), blocks_of(packing, values)](
        values.contiguous(),
        ids,
        values.shape[0],
        offsets,
        prepared,
        table,
        packed,
        partial,
        users,
        rows,
        0,
        packing.groups << tau,
        size,
        TAU=tau,
        BITS=packing.bits,
        GROUPS=packing.padded_groups,
        WORDS=packing.words,
        SIZE=padded_size(size),
        COLUMNS=columns,
        TILE=TILE,
        HASH=fused,
        WITH_LAST=True,
        PRODUCTS=products,
        PARTS=parts(values.dtype),
        **_shape(values, packing, products if fused else 0),
    )
    block = 1024
    _add_pieces[users, triton.cdiv(width, block)](
        offsets, partial, table, rows, width, TILE=TILE, BLOCK=block, num_warps=4
    )
    return table, packed


def sums_before_last(
    values: Tensor,
    offsets: Tensor,
    packed: Tensor,
    packing: Packing,
    tile: int,
    skipped: int,
    lines: int,
    ids: Tensor | None = None,
) -> Tensor:
    """Return sums of each piece of users but the last, where `place_of` says.

    Of `lines` rows of a table, behind those that are skipped; for more rows of behaviours than a
    piece has.

    Returns:
        `[rows // tile, lines * D]` float32; places of no piece are not written.
    """
    rows, size, users = packed.shape[0], values.shape[1], offsets.shape[0] - 1
    columns = _columns(packing, values)
    partial = values.new_empty(rows // tile, lines * size, dtype=torch.float32)
    _encode[slots(users, rows, tile), triton.cdiv(lines, columns)](
        values, ids, values.shape[0], offsets, packed, partial, packed, partial, users, rows,
        skipped, lines, size,
        TAU=packing.tau, BITS=packing.bits, GROUPS=packing.padded_groups, WORDS=packing.words,
        SIZE=padded_size(size), COLUMNS=columns, TILE=tile, HASH=False, WITH_LAST=False,
        PRODUCTS=0, PARTS=parts(values.dtype), **_shape(values, packing, 0),
    )  # fmt: skip
    return partial


def encode_backward(
    grad_table: Tensor, offsets: Tensor, packed: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of the behaviours `[N, D]` in `dtype`."""
    users, groups, buckets, size = grad_table.shape
    rows, packing = packed.shape[0], Packing(buckets.bit_length() - 1, groups)
    out = grad_table.new_empty(rows, size, dtype=dtype)
    if rows == 0:
        return out
    arguments = (grad_table.contiguous(), offsets, packed, out, users, rows, size, groups)
    grid = (slots(users, rows, TILE),)
    if holds(packing, out):
        _encode_backward[grid](
            *arguments,
            TAU=packing.tau,
            BITS=packing.bits,
            GROUPS=packing.padded_groups,
            WORDS=packing.words,
            SIZE=padded_size(size),
            TILE=TILE,
            HALF=dtype == torch.bfloat16,
            PARTS=parts(dtype),
            **_backward_shape(grad_table, dtype, packing),
        )
    else:
        _gather_backward[grid](
            *arguments,
            TAU=packing.tau,
            BITS=packing.bits,
            WORDS=packing.words,
            SIZE=padded_size(size),
            TILE=TILE,
            LENGTH=16,
            num_warps=4,
        )
    return out


def _shape(values: Tensor, packing: Packing, products: int) -> LaunchShape:
    size, older = values.shape[1], dispatch.before_hopper(values)
    exact = values.dtype == torch.float32
    if older:
        rule = {"LENGTH": 32 if exact or size > 128 else 64, "STAGES": 2, "num_warps": 8}
    elif exact:
        warps = 8 if 32 < size <= 64 or size > 128 else 4
        rule = {"LENGTH": 128 if size <= 64 else 64, "STAGES": 1, "num_warps": warps}
    else:
        # Three products or more than 32 groups spill in the registers of 4 warps.
        three = 64 < size <= 128 and products == 3
        many = 64 < size <= 128 and packing.padded_groups > 32
        length = 128 if 32 < size <= 64 or three else 64
        rule = {"LENGTH": length, "STAGES": 3, "num_warps": 8 if three or many else 4}
    lengths = (16, most_rows(packing)) if older or exact else (LEAST_HASHED, 256)
    rule["LENGTH"] = min(rule["LENGTH"], lengths[1])
    sizes = (padded_size(size), _columns(packing, values), spread_groups(packing), products)
    return launch_shape("encode", values.device, values.dtype, *sizes, rule=rule, lengths=lengths)


def _backward_shape(grad_table: Tensor, dtype: torch.dtype, packing: Packing) -> LaunchShape:
    size, older = grad_table.shape[3], dispatch.before_hopper(grad_table)
    exact = dtype == torch.float32
    if size > 128 or older:
        rule = {"LENGTH": 64, "STAGES": 2, "num_warps": 8}
    elif exact and size <= 32:
        rule = {"LENGTH": 256, "STAGES": 3, "num_warps": 4}
    else:
        rule = {"LENGTH": 128, "STAGES": 3, "num_warps": 8 if exact else 4}
    sizes = (padded_size(size), packing.padded_rows, spread_groups(packing))
    return launch_shape("encode_backward", grad_table.device, dtype, *sizes, rule=rule)
