"""Many candidates against bucket tables: hash, norms and the mean over groups in one kernel.

A small table is normalised once a program and read by products with one-hot codes; of a large one
only the rows that candidates fall into are read.
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
from hashtab.kernels.sdim.triton.rows import load_rows, padded_size, store_rows
from hashtab.kernels.sdim.triton.sums import (
    add_products,
    code_factor,
    collect,
    columns_at_once,
    columns_of_table,
    holds,
    inverse_norm,
    members,
    members_of_rows,
    most_rows,
    norm_gradient,
    parts,
    spread_groups,
)

_PROGRAMS = 132 * 4


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _read_small(
    table,
    vectors,
    prepared,
    interest,
    packed,
    candidates,
    share,
    size: tl.constexpr,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    LENGTH: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Read a share of a user's candidates from a table of one program's memory."""
    user = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * share
    length = tl.minimum(share, candidates - begin)
    first = user * candidates + begin
    BUCKETS: tl.constexpr = 1 << TAU
    COLUMNS: tl.constexpr = GROUPS * BUCKETS
    line = tl.arange(0, COLUMNS)
    sums = load_rows(table + user * groups * BUCKETS * size, line, groups * BUCKETS, size, SIZE)
    unit = sums * (inverse_norm(tl.sum(sums * sums, 1)) / groups)[:, None]
    high, middle, low = load_parts(
        prepared, 0, SIZE, BITS, GROUPS, GROUPS, vectors.dtype.element_ty, PRODUCTS, PARTS == 0
    )
    of_group, wanted = columns_of_table(0, COLUMNS, GROUPS, BUCKETS, PARTS == 0)
    vectors += first * size
    interest += first * size
    packed += first * WORDS
    for start in tl.range(0, length, LENGTH, num_stages=STAGES):
        row = start + tl.arange(0, LENGTH)
        x = load_rows(vectors, row, length, size, SIZE)
        codes = codes_of(positive(x, high, middle, low, PRODUCTS, PARTS == 0), LENGTH, GROUPS, BITS)
        store_rows(packed, row, length, pack(codes, LENGTH, GROUPS, BITS), WORDS, WORDS)
        codes = code_factor(codes, LENGTH, GROUPS, PARTS == 0)
        member = members_of_rows(codes, of_group, wanted, tl.bfloat16, PARTS == 0)
        store_rows(interest, row, length, collect(member, unit, PARTS), size, SIZE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _read_large(
    table,
    packed,
    interest,
    candidates,
    size: tl.constexpr,
    groups: tl.constexpr,
    TAU: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Read some of a user's candidates from a table of any size, one group after the other."""
    tiles = tl.cdiv(candidates, LENGTH)
    user = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * LENGTH
    row = tl.arange(0, LENGTH)
    there = row < candidates - first
    first_query = user * candidates + first
    packed += first_query * WORDS
    mean = tl.zeros([LENGTH, SIZE], tl.float32)
    column = tl.arange(0, SIZE)
    mask = there[:, None] & (column < size)[None, :]
    for group in range(groups):
        bit = group * BITS
        word = tl.load(packed + row * WORDS + bit // 32, mask=there, other=0)
        code = (word >> (bit % 32)) & ((1 << TAU) - 1)
        line = ((user * groups + group) << TAU) + code
        sums = tl.load(table + line[:, None] * size + column[None, :], mask=mask, other=0.0)
        mean += sums * inverse_norm(tl.sum(sums * sums, 1))[:, None]
    target = interest + first_query * size
    store_rows(target, row, candidates - first, mean / groups, size, SIZE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _read_backward(
    grad,
    table,
    packed,
    grad_table,
    candidates,
    size: tl.constexpr,
    groups: tl.constexpr,
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
    """Sum the gradients of candidates by row of the table, and take them through its norm."""
    user = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * COLUMNS
    BUCKETS: tl.constexpr = 1 << TAU
    grad += user * candidates * size
    packed += user * candidates * WORDS
    of_group, wanted = columns_of_table(first_column, COLUMNS, GROUPS, BUCKETS, PARTS == 0)
    upstream = tl.zeros([COLUMNS, SIZE], tl.float32)
    row = tl.arange(0, LENGTH)
    for start in tl.range(0, candidates, LENGTH, num_stages=STAGES):
        before, left = tl.cast(start, tl.int64), candidates - start
        x = load_rows(grad + before * size, row, left, size, SIZE)
        codes = load_codes(
            packed + before * WORDS, row, row < left, GROUPS, BITS, TAU, WORDS, LENGTH
        )
        codes = code_factor(codes, LENGTH, GROUPS, PARTS == 0)
        member = members(of_group, codes, wanted, x.dtype, PARTS == 0)
        upstream = add_products(upstream, member, x, PARTS)
    line, column = first_column + tl.arange(0, COLUMNS), tl.arange(0, SIZE)
    inside = (line < groups * BUCKETS)[:, None] & (column < size)[None, :]
    within = user * groups * BUCKETS * size + line[:, None] * size + column[None, :]
    sums = tl.load(table + within, mask=inside, other=0.0)
    tl.store(grad_table + within, norm_gradient(sums, upstream, groups), mask=inside)


def read(table: Tensor, queries: Tensor, planes: Tensor, tau: int) -> tuple[Tensor, Tensor]:
    """Return interests `[B, C, D]` float32 and packed codes of candidates `[B * C, words]`."""
    users, candidates, size = queries.shape
    table = table.contiguous()
    packing = Packing(tau, planes.shape[1] // tau)
    interest = table.new_empty(queries.shape)
    rows = queries.reshape(-1, size).contiguous()
    shape = {"TAU": tau, "BITS": packing.bits, "WORDS": packing.words, "SIZE": padded_size(size)}
    if not holds_tables(packing, table):
        packed = pack_codes(rows, planes, tau)
        if interest.numel():
            length = 4 if interpreted() else max(4, 2048 // padded_size(size))
            _read_large[(users * triton.cdiv(candidates, length),)](
                table, packed, interest, candidates, size, packing.groups, **shape,
                LENGTH=length, num_warps=4,
            )  # fmt: skip
        return interest, packed
    packed = torch.empty(users * candidates, packing.words, dtype=torch.int32, device=table.device)
    if interest.numel():
        products = products_of(planes, queries.dtype)
        options = _shape(queries, packing, products)
        share = options["LENGTH"] * triton.cdiv(
            candidates, options["LENGTH"] * max(1, _PROGRAMS // users)
        )
        _read_small[users, triton.cdiv(candidates, share)](
            table, rows, prepare(planes, packing, queries.dtype), interest, packed, candidates,
            share, size, packing.groups, **shape, GROUPS=packing.padded_groups,
            PRODUCTS=products, PARTS=parts(torch.float32), **options,
        )  # fmt: skip
    return interest, packed


def read_backward(grad: Tensor, table: Tensor, packed: Tensor) -> Tensor:
    """Return the gradient of the table `[B, G, 2**tau, D]` float32."""
    users, groups, buckets, size = table.shape
    grad, table, candidates = grad.contiguous(), table.contiguous(), grad.shape[1]
    packing = Packing(buckets.bit_length() - 1, groups)
    grad_table = table.new_empty(table.shape)
    if grad_table.numel() == 0:
        return grad_table
    columns = max(16, min(packing.padded_rows, columns_at_once(table)))
    _read_backward[users, triton.cdiv(groups * buckets, columns)](
        grad, table, packed, grad_table, candidates, size, groups, TAU=packing.tau,
        BITS=packing.bits, GROUPS=packing.padded_groups, WORDS=packing.words,
        SIZE=padded_size(size), COLUMNS=columns, PARTS=parts(torch.float32),
        **_backward_shape(table, packing, columns),
    )  # fmt: skip
    return grad_table


def holds_tables(packing: Packing, table: Tensor) -> bool:
    """Return whether a program holds a user's table and planes; older GPUs are small for it."""
    older = dispatch.before_hopper(table)
    return not older and holds(packing, table) and hashes_within(packing, table)


def _shape(queries: Tensor, packing: Packing, products: int) -> LaunchShape:
    size = queries.shape[2]
    exact = queries.dtype == torch.float32
    rule = {"LENGTH": 128 if not exact and size <= 128 else 32, "STAGES": 1, "num_warps": 8}
    if size <= 32:
        rule = {"LENGTH": 64, "STAGES": 1, "num_warps": 4}
    elif size <= 64 and exact:
        rule = {"LENGTH": 128, "STAGES": 2, "num_warps": 4}
    sizes = (padded_size(size), packing.padded_rows, spread_groups(packing), products)
    return launch_shape("read", queries.device, queries.dtype, *sizes, rule=rule)


def _backward_shape(table: Tensor, packing: Packing, columns: int) -> LaunchShape:
    size, older = table.shape[3], dispatch.before_hopper(table)
    rule = {"LENGTH": 16 if size > 128 else 64, "STAGES": 1, "num_warps": 8 if size > 64 else 4}
    if older:
        rule = {"LENGTH": 32, "STAGES": 2, "num_warps": 8}
    most = most_rows(packing)
    rule["LENGTH"] = min(rule["LENGTH"], most)
    sizes = (padded_size(size), columns, spread_groups(packing))
    return launch_shape(
        "read_backward", table.device, table.dtype, *sizes, rule=rule, lengths=(16, most)
    )
