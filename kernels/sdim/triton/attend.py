"""Few candidates against whole histories without a table: one read of the behaviours.

The sums of the buckets that candidates fall into are products of a membership mask and the
behaviours, whatever tau is. Backward is one pass over the packed codes.
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
    load_wanted,
    pack,
    pack_codes,
    positive,
    prepare,
    products_of,
)
from hashtab.kernels.sdim.triton.rows import (
    load_behaviours,
    load_rows,
    padded_size,
    store_rows,
)
from hashtab.kernels.sdim.triton.sums import (
    LEAST_HASHED,
    bfloat16_parts,
    collect,
    columns_at_once,
    inverse_norm,
    norm_gradient,
    partial_of,
    partial_sums,
    parts,
    piece,
    sum_of_pieces,
)

TILE = 1024  # rows of a piece
# Going round candidates is nothing but a loop's costs where there is one.
_ONE_CANDIDATE_APART = {
    "do_not_specialize": [name for name in UNSPECIALIZED if name != "candidates"],
    "do_not_specialize_on_alignment": ["candidates"],
}


@triton.jit
def _members(codes, wanted, LENGTH: tl.constexpr, CANDIDATES: tl.constexpr, GROUPS: tl.constexpr):
    """Return `[LENGTH, CANDIDATES * GROUPS]`, whether a behaviour shares the bucket."""
    if CANDIDATES == 1:
        found = codes == wanted
    else:
        same = codes[:, None, :] == wanted[None, :, :]
        found = tl.reshape(same, [LENGTH, CANDIDATES * GROUPS])
    return found


@triton.jit
def _add_products_t(sums_t, x, member, PARTS: tl.constexpr):
    """Return `add_products` turned over: one candidate's columns are too few for a first factor.

    Args:
        sums_t: `[SIZE, COLUMNS]`.
        x: `[LENGTH, SIZE]`.
        member: `[LENGTH, COLUMNS]`.
        PARTS: as `parts` returns.
    """
    x = tl.trans(x)
    if PARTS == 0:
        x, member = x.to(tl.float32), member.to(tl.float32)
        sums_t = tl.dot(x, member, sums_t, input_precision="ieee")
    elif x.dtype == tl.float32:
        member = member.to(tl.bfloat16)
        high, middle, low = bfloat16_parts(x, 3)
        sums_t += tl.dot(high, member, tl.dot(middle, member, tl.dot(low, member)))
    else:
        sums_t = tl.dot(x, member.to(x.dtype), sums_t)
    return sums_t


@triton.jit
def _store_interest(
    interest,
    sums_t,
    query,
    there,
    column,
    size,
    groups,
    GROUPS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Normalise sums `[SIZE, CANDIDATES * GROUPS]` and store their means."""
    scale = inverse_norm(tl.sum(sums_t * sums_t, 0)) / groups
    mean = tl.sum(tl.reshape(sums_t * scale[None, :], [SIZE, CANDIDATES, GROUPS]), 2)
    address = query[None, :] * size + column[:, None]
    tl.store(interest + address, mean, mask=there[None, :] & (column < size)[:, None])


@triton.jit(**_ONE_CANDIDATE_APART)
def _attend(
    values,
    ids,
    items,
    offsets,
    prepared,
    query_packed,
    interest,
    packed,
    sums,
    partial,
    users,
    rows,
    size: tl.constexpr,
    groups: tl.constexpr,
    candidates,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    HASH: tl.constexpr,
    KEEP: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    user, begin, end, alone = piece(offsets, users, rows, TILE)
    if (begin >= end) & (alone == 0):
        return
    first = tl.program_id(1) * CANDIDATES
    candidate = first + tl.arange(0, CANDIDATES)
    there = candidate < candidates
    query = user * candidates + candidate
    wanted = load_wanted(query_packed, query, there, groups, GROUPS, BITS, TAU, WORDS, CANDIDATES)
    column = tl.arange(0, SIZE)
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
    sums_t = tl.zeros([SIZE, CANDIDATES * GROUPS], tl.float32)
    for start in tl.range(0, length, LENGTH, num_stages=STAGES):
        row = start + tl.arange(0, LENGTH)
        x = load_behaviours(values, ids, items, row, length, size, SIZE)
        if HASH:
            above = positive(x, high, middle, low, PRODUCTS, PARTS == 0)
            codes = codes_of(above, LENGTH, GROUPS, BITS)
            if KEEP:
                store_rows(packed, row, length, pack(codes, LENGTH, GROUPS, BITS), WORDS, WORDS)
        else:
            codes = load_codes(packed, row, row < length, GROUPS, BITS, TAU, WORDS, LENGTH)
        member = _members(codes, wanted, LENGTH, CANDIDATES, GROUPS)
        sums_t = _add_products_t(sums_t, x, member, PARTS)

    if alone:
        _store_interest(
            interest, sums_t, query, there, column, size, groups, GROUPS, CANDIDATES, SIZE
        )
    # Sums [C, GROUPS, size] of a candidate lie together, of pieces and of users.
    line = tl.arange(0, CANDIDATES * GROUPS)
    width = tl.cast(candidates, tl.int64) * GROUPS * size
    within = (first * GROUPS + line)[None, :] * size + column[:, None]
    inside = (first * GROUPS + line < candidates * GROUPS)[None, :] & (column < size)[:, None]
    if alone:
        if KEEP:
            tl.store(sums + user * width + within, sums_t, mask=inside)
    else:
        first_row, _ = span(offsets, user, rows)
        index = (begin - first_row) // TILE
        target = partial + partial_of(offsets, user, rows, index, TILE) * width
        tl.store(target + within, sums_t, mask=inside)


@triton.jit(**_ONE_CANDIDATE_APART)
def _finish(
    offsets,
    partial,
    interest,
    sums,
    rows,
    size: tl.constexpr,
    groups: tl.constexpr,
    candidates,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Add the pieces of a candidate whose user has several."""
    query = tl.program_id(0).to(tl.int64)
    user = query // candidates
    begin, end = span(offsets, user, rows)
    pieces = (end - begin + TILE - 1) // TILE
    if pieces <= 1:
        return
    column, element = tl.arange(0, SIZE), tl.arange(0, GROUPS * SIZE)
    width = tl.cast(candidates, tl.int64) * GROUPS * size
    inside = element % SIZE < size
    within = ((query % candidates) * GROUPS + element // SIZE) * size + element % SIZE
    total = sum_of_pieces(
        partial, offsets, user, rows, width, within, inside, pieces, TILE, AT_ONCE
    )
    if KEEP:
        tl.store(sums + user * width + within, total, mask=inside)
    one = query + tl.arange(0, 1)
    sums_t = tl.trans(tl.reshape(total, [GROUPS, SIZE]))
    _store_interest(interest, sums_t, one, one >= 0, column, size, groups, GROUPS, 1, SIZE)


@triton.jit(**_ONE_CANDIDATE_APART)
def _attend_backward(
    grad,
    sums,
    offsets,
    packed,
    query_packed,
    grad_values,
    users,
    rows,
    size: tl.constexpr,
    groups: tl.constexpr,
    candidates,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    user, begin, end, _ = piece(offsets, users, rows, TILE)
    if begin >= end:
        return
    column = tl.arange(0, SIZE)
    line = tl.arange(0, CANDIDATES * GROUPS)
    grad_values += begin * size
    packed += begin * WORDS
    length = tl.cast(end - begin, tl.int32)
    for first in range(0, candidates, CANDIDATES):
        there = (first + line // GROUPS < candidates)[:, None] & (column < size)[None, :]
        query = user * candidates + first + line // GROUPS
        upstream = tl.load(
            grad + query[:, None] * size + column[None, :], mask=there, other=0.0
        ).to(tl.float32)
        address = (user * candidates * GROUPS + first * GROUPS + line)[:, None] * size
        total = tl.load(sums + address + column[None, :], mask=there, other=0.0)
        grad_sums = norm_gradient(total, upstream, groups)
        candidate = first + tl.arange(0, CANDIDATES)
        wanted = load_wanted(
            query_packed,
            user * candidates + candidate,
            candidate < candidates,
            groups,
            GROUPS,
            BITS,
            TAU,
            WORDS,
            CANDIDATES,
        )
        for start in tl.range(0, length, LENGTH, num_stages=STAGES):
            row = start + tl.arange(0, LENGTH)
            codes = load_codes(packed, row, row < length, GROUPS, BITS, TAU, WORDS, LENGTH)
            member = _members(codes, wanted, LENGTH, CANDIDATES, GROUPS)
            member = member.to(tl.float32 if PARTS == 0 else tl.bfloat16)
            found = collect(member, grad_sums, PARTS)
            if first > 0:
                found += load_rows(grad_values, row, length, size, SIZE)
            store_rows(grad_values, row, length, found, size, SIZE)
        tl.debug_barrier()  # other threads read what these stored in the next round


def _candidates_at_once(candidates: int, groups: int, rows: Tensor) -> int:
    most = max(1, columns_at_once(rows) // groups)
    return max(1, min(int(triton.next_power_of_2(candidates)), most))


def blocks_of(candidates: int, packing: Packing, values: Tensor) -> int:
    """Return how many programs share the candidates of a user."""
    at_once = _candidates_at_once(candidates, packing.padded_groups, values)
    return int(triton.cdiv(candidates, at_once))


def attend(
    values: Tensor,
    offsets: Tensor,
    queries: Tensor,
    planes: Tensor,
    tau: int,
    keep: bool,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the interests of candidates and what backward reads, which is empty without `keep`.

    Returns:
        Interests `[B, C, D]`; packed codes of behaviours `[N, words]` and of candidates
        `[B * C, words]`; sums of the candidates' buckets `[B, C, GROUPS, D]` float32.
    """
    users, candidates, size = queries.shape
    rows = (values if ids is None else ids).shape[0]
    packing = Packing(tau, planes.shape[1] // tau)
    groups = packing.padded_groups
    prepared = prepare(planes, packing, values.dtype)
    shared = prepared if queries.dtype == values.dtype else None
    query_packed = pack_codes(queries.reshape(-1, size), planes, tau, shared)
    interest = values.new_empty(queries.shape)
    at_once = _candidates_at_once(candidates, groups, values)
    blocks, products = blocks_of(candidates, packing, values), products_of(planes, values.dtype)
    fused = blocks <= 1 and hashes_within(packing, values)
    if fused:
        packed = query_packed.new_empty(rows if keep else 0, packing.words)
    else:
        packed = pack_codes(values, planes, tau, prepared, ids)
    kept = users if keep else 0
    sums = values.new_empty(kept, candidates, groups, size, dtype=torch.float32)
    if interest.numel() == 0:
        return interest, packed if keep else packed[:0], query_packed, sums
    partial = partial_sums(rows, TILE, candidates * groups * size, values)
    _attend[slots(users, rows, TILE), blocks](
        values.contiguous(),
        ids,
        values.shape[0],
        offsets,
        prepared,
        query_packed,
        interest,
        packed,
        sums,
        partial,
        users,
        rows,
        size,
        packing.groups,
        candidates,
        TAU=tau,
        BITS=packing.bits,
        GROUPS=groups,
        WORDS=packing.words,
        SIZE=padded_size(size),
        CANDIDATES=at_once,
        TILE=TILE,
        HASH=fused,
        KEEP=keep,
        PRODUCTS=products,
        PARTS=parts(values.dtype),
        **_forward_shape(
            values, candidates, at_once * groups, products * packing.columns if fused else 0
        ),
    )
    _finish[(users * candidates,)](
        offsets,
        partial,
        interest,
        sums,
        rows,
        size,
        packing.groups,
        candidates,
        GROUPS=groups,
        SIZE=padded_size(size),
        TILE=TILE,
        AT_ONCE=max(1, min(8, 4096 // (groups * padded_size(size)))),
        KEEP=keep,
        num_warps=8 if groups * padded_size(size) > 2048 else 4,
    )
    return interest, packed if keep else packed[:0], query_packed, sums


def attend_backward(
    grad: Tensor,
    offsets: Tensor,
    packed: Tensor,
    query_packed: Tensor,
    sums: Tensor,
    groups: int,
    tau: int,
) -> Tensor:
    """Return the gradient of the behaviours `[N, D]` in the dtype of `grad` `[B, C, D]`."""
    (users, candidates, size), rows = grad.shape, packed.shape[0]
    packing = Packing(tau, groups)
    at_once = _candidates_at_once(candidates, packing.padded_groups, grad)
    # Several rounds of candidates add up in float32.
    out = grad.new_empty(rows, size, dtype=grad.dtype if candidates <= at_once else torch.float32)
    if out.numel() == 0 or candidates == 0:
        return out.zero_().to(grad.dtype)
    _attend_backward[(slots(users, rows, TILE),)](
        grad.contiguous(),
        sums,
        offsets,
        packed,
        query_packed,
        out,
        users,
        rows,
        size,
        groups,
        candidates,
        TAU=tau,
        BITS=packing.bits,
        GROUPS=packing.padded_groups,
        WORDS=packing.words,
        SIZE=padded_size(size),
        CANDIDATES=max(at_once, triton.cdiv(16, packing.padded_groups)),
        TILE=TILE,
        PARTS=parts(grad.dtype),
        **_backward_shape(grad, at_once * packing.padded_groups),
    )
    return out.to(grad.dtype)


def _forward_shape(values: Tensor, candidates: int, columns: int, hashed: int) -> LaunchShape:
    size, older = values.shape[1], dispatch.before_hopper(values)
    exact = values.dtype == torch.float32
    rule = {"LENGTH": 64, "STAGES": 3, "num_warps": 8 if columns > 64 else 4}
    if columns <= 16 and hashed <= 64 and not older:
        rule = {
            "LENGTH": 128 if size <= 64 else 64,
            "STAGES": 2 if size > 32 else 3,
            "num_warps": 4,
        }
    if exact or size > 128:
        rule = {"LENGTH": 64, "STAGES": 2, "num_warps": 8}
    if exact and size <= 64 and columns <= 16 and not older:
        rule["num_warps"] = 4
    elif exact and (older or size > 32):
        rule["LENGTH"] = 16 if size > 64 and columns > 64 else 32
    sizes = (padded_size(size), columns, hashed, min(candidates, 2))  # one or several
    lengths = (LEAST_HASHED if hashed and not exact and not older else 16, 256)
    return launch_shape("attend", values.device, values.dtype, *sizes, rule=rule, lengths=lengths)


def _backward_shape(grad: Tensor, columns: int) -> LaunchShape:
    (_, candidates, size), older = grad.shape, dispatch.before_hopper(grad)
    exact = grad.dtype == torch.float32
    rule = {
        "LENGTH": 64 if older and size > 64 else 128,
        "STAGES": 1 if older else 3,
        "num_warps": 8 if (size > 64 and exact) or size * columns > 4096 else 4,
    }
    if size > 128:
        rule = {"LENGTH": 32, "STAGES": 1, "num_warps": 8}
        if columns > 32 and not exact and not older:  # several candidates spill in 32 rows
            rule = {"LENGTH": 64, "STAGES": 1, "num_warps": 4 if candidates == 1 else 8}
    sizes = (padded_size(size), columns, min(candidates, 2))  # one or several
    return launch_shape("attend_backward", grad.device, grad.dtype, *sizes, rule=rule)
