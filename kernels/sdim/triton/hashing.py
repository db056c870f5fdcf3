"""Hashing on a GPU: signs of float32 products, codes, and their packed form.

A code takes `BITS` bits, tau rounded up to a power of two; 32 / BITS codes share an int32 word, so
a behaviour takes 8 bytes for 16 groups of 3 bits. Where products are made from 16-bit parts, three
parts of a plane hold all of its float32 digits, and the products accumulate in float32. Planes in
the dtype of the rows are one part, and take a third of the products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashtab.kernels.core import dispatch
from hashtab.kernels.core.dispatch import interpreted
from hashtab.kernels.core.tiles import UNSPECIALIZED
from hashtab.kernels.core.tuning import LaunchShape, launch_shape
from hashtab.kernels.sdim.packing import Packing
from hashtab.kernels.sdim.triton.rows import load_behaviours, padded_size

_MOST_WITHIN = 8192  # entries of planes whose three parts a program keeps beside the history
_MANY = 100_000  # rows, which fill a GPU with longer programs too
_COLUMNS = 64  # products of a row that a program makes at once
_TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@triton.jit
def load_planes(
    planes,
    stride_size,
    stride_plane,
    size: tl.constexpr,
    first_group,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Return `[SIZE, BITS * GROUPS]` float32: each bit's planes of all groups, zeros for none.

    Bit by bit, for then all bits of a group lie with one thread.
    """
    column = tl.arange(0, BITS * GROUPS)
    group, bit = first_group + column % GROUPS, column // GROUPS
    row = tl.arange(0, SIZE)
    valid = (row < size)[:, None] & ((bit < TAU) & (group < groups))[None, :]
    address = row[:, None] * stride_size + (group * TAU + bit)[None, :] * stride_plane
    return tl.load(planes + address, mask=valid, other=0.0).to(tl.float32)


def products_of(planes: Tensor, dtype: torch.dtype) -> int:
    """Return how many products with rows of `dtype` hash exactly, where these have 16 bits."""
    return 1 if planes.dtype == dtype else 3


@triton.jit
def _inverse_power_of_two(x):
    """Return 1 over the largest power of two up to x, 1 where x is no ordinary number above 0."""
    exponent = x.to(tl.int32, bitcast=True) >> 23
    ordinary = (exponent > 0) & (exponent < 254)
    return tl.where(ordinary, (254 - exponent) << 23, 127 << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(planes, DTYPE: tl.constexpr, PRODUCTS: tl.constexpr, EXACT: tl.constexpr):
    """Return the parts of planes `[SIZE, BITS * GROUPS]` float32 for products with `DTYPE`.

    For a 16-bit type their sum has the planes' digits; for float16 and its range, planes are scaled
    by powers of two to a largest entry of 1 to 2, of which those below 2^-24 lose digits. Else they
    are the planes.
    """
    if EXACT or tl.float32 == DTYPE:
        return planes, planes, planes
    if PRODUCTS == 1:
        same = planes.to(DTYPE)
        return same, same, same
    if tl.float16 == DTYPE:
        planes = planes * _inverse_power_of_two(tl.max(tl.abs(planes), 0))[None, :]
    high = planes.to(DTYPE)
    rest = planes - high.to(tl.float32)
    middle = rest.to(DTYPE)
    return high, middle, (rest - middle.to(tl.float32)).to(DTYPE)


@triton.jit
def positive(x, high, middle, low, PRODUCTS: tl.constexpr, EXACT: tl.constexpr):
    """Return whether each product `[L, BITS * GROUPS]` of rows and planes is above 0.

    Args:
        x: `[L, SIZE]`.
        high: the planes' first part, as `split` returns them for the dtype of `x`.
        middle: the second.
        low: the third.
        PRODUCTS: as `products_of` returns.
        EXACT: whether products are of float32 itself (Triton's interpreter).
    """
    if EXACT:
        return tl.dot(x.to(tl.float32), high, input_precision="ieee") > 0
    if x.dtype == tl.float32:
        return tl.dot(x, high, input_precision="tf32x3") > 0
    if PRODUCTS == 1:
        return tl.dot(x, high) > 0
    products = tl.dot(x, low)
    products = tl.dot(x, middle, products)
    return tl.dot(x, high, products) > 0


@triton.jit
def _part(
    first_group,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
):
    """Return where `[SIZE, BITS * GROUPS]` entries of GROUPS groups lie in a prepared part."""
    column = tl.arange(0, BITS * GROUPS)
    column = column // GROUPS * ALL_GROUPS + first_group + column % GROUPS
    return tl.arange(0, SIZE)[:, None] * (BITS * ALL_GROUPS) + column[None, :]


@triton.jit
def load_parts(
    prepared,
    first_group,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Return the three parts `[SIZE, BITS * GROUPS]` of GROUPS groups' planes, from `prepare`."""
    part = _part(first_group, SIZE, BITS, GROUPS, ALL_GROUPS)
    ENTRIES: tl.constexpr = SIZE * BITS * ALL_GROUPS
    high = tl.load(prepared + part)
    if EXACT or tl.float32 == DTYPE or PRODUCTS == 1:
        return high, high, high
    return high, tl.load(prepared + ENTRIES + part), tl.load(prepared + 2 * ENTRIES + part)


@triton.jit
def _prepare(
    planes,
    prepared,
    stride_size,
    stride_plane,
    size: tl.constexpr,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    EXACT: tl.constexpr,
):
    first_group = tl.program_id(0) * GROUPS
    loaded = load_planes(
        planes, stride_size, stride_plane, size, first_group, groups, TAU, BITS, GROUPS, SIZE
    )
    high, middle, low = split(loaded, DTYPE, PRODUCTS, EXACT)
    part = _part(first_group, SIZE, BITS, GROUPS, ALL_GROUPS)
    ENTRIES: tl.constexpr = SIZE * BITS * ALL_GROUPS
    tl.store(prepared + part, high)
    if PRODUCTS > 1:
        tl.store(prepared + ENTRIES + part, middle)
        tl.store(prepared + 2 * ENTRIES + part, low)


@triton.jit
def codes_of(above, LENGTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Return codes `[LENGTH, GROUPS]` int32 from signs `[LENGTH, BITS * GROUPS]`."""
    weight = 1 << (tl.arange(0, BITS * GROUPS) // GROUPS)
    weighted = tl.where(above, weight[None, :], 0)
    return tl.sum(tl.reshape(weighted, [LENGTH, BITS, GROUPS]), 1)


@triton.jit
def pack(codes, LENGTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Return words `[LENGTH, WORDS]` int32 from codes `[LENGTH, GROUPS]`."""
    PER: tl.constexpr = GROUPS if GROUPS * BITS < 32 else 32 // BITS
    shift = (tl.arange(0, GROUPS) % PER) * BITS
    return tl.sum(tl.reshape(codes << shift[None, :], [LENGTH, GROUPS // PER, PER]), 2)


@triton.jit
def unpack(
    words, LENGTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, TAU: tl.constexpr
):
    """Return codes `[LENGTH, GROUPS]` int32 from words `[LENGTH, WORDS]`."""
    PER: tl.constexpr = GROUPS if GROUPS * BITS < 32 else 32 // BITS
    shift = tl.arange(0, PER) * BITS
    apart = words[:, :, None] >> shift[None, None, :]
    return tl.reshape(apart, [LENGTH, GROUPS]) & ((1 << TAU) - 1)


@triton.jit
def load_codes(
    packed,
    row,
    valid,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    TAU: tl.constexpr,
    WORDS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Return the codes `[LENGTH, GROUPS]` of rows `[LENGTH]` of `packed` `[N, WORDS]`."""
    address = row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    words = tl.load(packed + address, mask=valid[:, None], other=0)
    return unpack(words, LENGTH, GROUPS, BITS, TAU)


@triton.jit
def load_wanted(
    query_packed,
    query,
    there,
    groups: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    TAU: tl.constexpr,
    WORDS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Return the codes `[QUERIES, GROUPS]` of queries, -1 where there is no query or no group."""
    codes = load_codes(query_packed, query, there, GROUPS, BITS, TAU, WORDS, QUERIES)
    valid = there[:, None] & (tl.arange(0, GROUPS) < groups)[None, :]
    return tl.where(valid, codes, -1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _hash(
    x,
    ids,
    items,
    prepared,
    out,
    rows,
    size: tl.constexpr,
    groups: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    PACKED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Hash a tile of rows, or of rows `ids` of a table: GROUPS of all groups a program.

    Packed, or one int32 a code.
    """
    first_group = tl.program_id(1) * GROUPS
    begin = tl.program_id(0).to(tl.int64) * TILE
    length = tl.cast(tl.minimum(rows - begin, TILE), tl.int32)
    high, middle, low = load_parts(
        prepared,
        first_group,
        SIZE,
        BITS,
        GROUPS,
        ALL_GROUPS,
        x.dtype.element_ty,
        PRODUCTS,
        EXACT,
    )
    if ids is None:
        x += begin * size
    else:
        ids += begin
    for start in tl.range(0, length, LENGTH, num_stages=STAGES):
        row = start + tl.arange(0, LENGTH)
        tile = load_behaviours(x, ids, items, row, length, size, SIZE)
        found = codes_of(positive(tile, high, middle, low, PRODUCTS, EXACT), LENGTH, GROUPS, BITS)
        if PACKED:
            BLOCK: tl.constexpr = GROUPS * BITS // 32 if GROUPS * BITS >= 32 else 1
            word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            address = (begin + row)[:, None] * WORDS + word[None, :]
            mask = (row < length)[:, None] & (word < WORDS)[None, :]
            tl.store(out + address, pack(found, LENGTH, GROUPS, BITS), mask=mask)
        else:
            group = first_group + tl.arange(0, GROUPS)
            address = (begin + row)[:, None] * groups + group[None, :]
            mask = (row < length)[:, None] & (group < groups)[None, :]
            tl.store(out + address, found, mask=mask)


def hashes_within(packing: Packing, rows: Tensor) -> bool:
    """Return whether a program that reads `rows` `[..., D]` for else can hash them on the way."""
    less = dispatch.before_hopper(rows) and rows.dtype == torch.float32
    entries = packing.columns * padded_size(rows.shape[-1])
    return entries <= (_MOST_WITHIN // 2 if less else _MOST_WITHIN)


def prepare(planes: Tensor, packing: Packing, dtype: torch.dtype) -> Tensor:
    """Return the planes' parts as programs load them for rows of `dtype`, `[3, SIZE, COLUMNS]`.

    Where `products_of` says one, the first is all that counts.

    One small program once, in place of the same work in each of thousands.
    """
    size = padded_size(planes.shape[0])
    kept = torch.float32 if interpreted() else dtype
    prepared = planes.new_empty(3, size, packing.columns, dtype=kept)
    at_once = min(packing.padded_groups, max(1, _MOST_WITHIN // (size * packing.bits)))
    _prepare[(packing.padded_groups // at_once,)](
        planes,
        prepared,
        *planes.stride(),
        planes.shape[0],
        packing.groups,
        TAU=packing.tau,
        BITS=packing.bits,
        GROUPS=at_once,
        ALL_GROUPS=packing.padded_groups,
        SIZE=size,
        DTYPE=_TRITON_DTYPE[dtype],
        PRODUCTS=products_of(planes, dtype),
        EXACT=interpreted(),
        num_warps=8,
    )
    return prepared


def pack_codes(
    x: Tensor,
    planes: Tensor,
    tau: int,
    prepared: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """Return the packed codes of rows `[N, D]`: `[N, words]` int32.

    `prepared` are the planes, if they are prepared for rows of this dtype already. With `ids`
    `[N]`, rows are those of `x` `[V, D]`.
    """
    packing = Packing(tau, planes.shape[1] // tau)
    rows = (x if ids is None else ids).shape[0]
    packed = torch.empty(rows, packing.words, dtype=torch.int32, device=x.device)
    _launch(x, ids, planes, packing, prepared, packed)
    return packed


def codes(x: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Return the bucket of each row in each group, `[N, G]` int32."""
    packing = Packing(tau, planes.shape[1] // tau)
    found = torch.empty(x.shape[0], packing.groups, dtype=torch.int32, device=x.device)
    _launch(x, None, planes, packing, None, found, packed=False)
    return found


def _launch(
    x: Tensor,
    ids: Tensor | None,
    planes: Tensor,
    packing: Packing,
    prepared: Tensor | None,
    out: Tensor,
    packed: bool = True,
) -> None:
    rows, size = out.shape[0], x.shape[1]
    if rows == 0:
        return
    exact = x.dtype == torch.float32
    columns = _COLUMNS // 2 if size > 128 and (exact or dispatch.before_hopper(x)) else _COLUMNS
    groups = min(packing.padded_groups, max(1, columns // packing.bits))
    products = products_of(planes, x.dtype)
    shape = _shape(x, groups * packing.bits, products)
    tile = shape["LENGTH"] * (8 if rows > _MANY else 1)
    written = packing.padded_groups if packed else packing.groups
    _hash[triton.cdiv(rows, tile), triton.cdiv(written, groups)](
        x.contiguous(),
        ids,
        x.shape[0],
        prepare(planes, packing, x.dtype) if prepared is None else prepared,
        out,
        rows,
        size,
        packing.groups,
        BITS=packing.bits,
        GROUPS=groups,
        ALL_GROUPS=packing.padded_groups,
        WORDS=packing.words,
        SIZE=padded_size(size),
        TILE=tile,
        PACKED=packed,
        PRODUCTS=products,
        EXACT=interpreted(),
        **shape,
    )


def _shape(x: Tensor, columns: int, products: int) -> LaunchShape:
    size, exact, older = x.shape[1], x.dtype == torch.float32, dispatch.before_hopper(x)
    if exact and size > 128:
        rule = {"LENGTH": 16, "STAGES": 1, "num_warps": 4}
    elif size > 128:
        rule = {"LENGTH": 64 if older else 128, "STAGES": 1, "num_warps": 8}
    elif exact:
        rule = {"LENGTH": 32 if older and size > 64 else 64, "STAGES": 1}
        rule["num_warps"] = 8 if older else 4
    else:
        rule = {"LENGTH": 64, "STAGES": 3, "num_warps": 4}
    sizes = (padded_size(size), columns, products)
    return launch_shape("hash", x.device, x.dtype, *sizes, rule=rule)
