"""Sums of behaviours by membership, which encode and attend share: pieces of users and products.

Users' rows are cut into pieces of a fixed number of rows (`core.tiles`), one program each. A user
of one piece is finished there; pieces of others leave partial sums, which a second kernel adds in
the order of time. So a user's result has the same bits whoever else is in the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashtab.kernels.core import dispatch
from hashtab.kernels.core.dispatch import interpreted
from hashtab.kernels.core.tiles import span, user_slot
from hashtab.kernels.sdim.packing import Packing


def parts(dtype: torch.dtype) -> int:
    """Return in how many bfloat16 parts a float32 operand gives results as good as `dtype`.

    0 stands for operands as they are, in float32 products (Triton's interpreter).
    """
    if interpreted():
        return 0
    return 3 if dtype == torch.float32 else 2


def columns_at_once(rows: Tensor) -> int:
    """Return how many columns of sums of `rows` `[..., D]` a program makes at once."""
    size, older = rows.shape[-1], dispatch.before_hopper(rows)
    if size > 128:
        return 32
    return 64 if older and size > 64 and rows.dtype == torch.float32 else 128


def holds(packing: Packing, rows: Tensor) -> bool:
    """Return whether a program collects from a table of sums of `rows` `[..., D]` by products.

    A product takes 16 rows at least.
    """
    return 16 <= packing.padded_rows <= columns_at_once(rows)


def partial_sums(rows: int, tile: int, width: int, like: Tensor) -> Tensor:
    """Return room for the sums of all pieces of users with several: two for each tile of rows."""
    shape = (2 * triton.cdiv(rows, tile), width)
    return torch.empty(shape, dtype=torch.float32, device=like.device)


@triton.jit
def piece(offsets, users, rows, TILE: tl.constexpr):
    """Return user, begin and end of this program's piece, and whether it is the whole user.

    There is nothing to do where begin >= end, unless the user is empty and this the whole of it.
    """
    user, begin, end = user_slot(offsets, users, tl.program_id(0), TILE)
    first, behind = span(offsets, user, rows)
    begin = tl.maximum(begin, first)
    end = tl.minimum(end, behind)
    return user, begin, end, (begin == first) & (end == behind)


@triton.jit
def partial_of(offsets, user, rows, index, TILE: tl.constexpr):
    """Return where the sums of a user's pieces of these indices lie, of a user with several.

    The last piece of one user and the first of the next may fall on one tile of rows: so last
    pieces take the even places.
    """
    first, behind = span(offsets, user, rows)
    others = (first + index * TILE + TILE < behind).to(tl.int64)
    return 2 * (first // TILE + index) + others


@triton.jit
def place_of(offsets, user, rows, index, TILE: tl.constexpr):
    """Return where the sums of a user's piece lie that is not the last: one for a tile of rows.

    It holds TILE rows, so no other piece that is not the last begins on the same tile.
    """
    first, _ = span(offsets, user, rows)
    return first // TILE + tl.maximum(index, 0)  # below 0 if offsets are wrong


@triton.jit
def sum_of_pieces(
    partial,
    offsets,
    user,
    rows,
    width,
    element,
    inside,
    pieces,
    TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Return the sum over a user's pieces of elements `[E]` of their partial sums, in order.

    AT_ONCE pieces are loaded together.
    """
    total = tl.zeros(element.shape, tl.float32)
    for start in range(0, pieces, AT_ONCE):
        index = start + tl.arange(0, AT_ONCE)
        line = partial_of(offsets, user, rows, index, TILE)
        mask = (index < pieces)[:, None] & inside[None, :]
        address = partial + line[:, None] * width + element[None, :]
        total += tl.sum(tl.load(address, mask=mask, other=0.0), 0)
    return total


@triton.jit
def ones_at_zero(rest, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """Return 1 where integers are 0, else 0, as factors for rows of DTYPE, or parts of float32.

    A comparison and a choice; but of these LLVM makes vectors of bits, which take twice the
    instructions. EXACT is Triton's interpreter, which knows no assembly.
    """
    if EXACT:
        return (rest == 0).to(tl.float32)
    OPERAND: tl.constexpr = tl.bfloat16 if tl.float32 == DTYPE else DTYPE
    one = tl.full([1] * len(rest.shape), 1.0, OPERAND).to(tl.int16, bitcast=True)
    found = tl.inline_asm_elementwise(
        "{ .reg .pred zero; setp.eq.b32 zero, $1, 0; selp.b16 $0, $2, 0, zero; }",
        "=h,r,h",
        [rest, one],
        dtype=tl.int16,
        is_pure=True,
        pack=1,
    )
    return found.to(OPERAND, bitcast=True)


@triton.jit
def one_hot(
    codes,
    first_column,
    LENGTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BUCKETS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Return `[LENGTH, COLUMNS]`, 1 where codes `[LENGTH, GROUPS]` are those of a table's rows.

    Columns count rows of a table `[GROUPS, BUCKETS]` from `first_column` on, a multiple of COLUMNS.
    DTYPE and EXACT are those of `ones_at_zero`.
    """
    if COLUMNS >= BUCKETS:
        HELD: tl.constexpr = COLUMNS // BUCKETS
        bucket = tl.arange(0, BUCKETS)
        held = codes
        if HELD < GROUPS:
            held = _pick(codes, first_column // BUCKETS, LENGTH, GROUPS, HELD)
        found = ones_at_zero(held[:, :, None] ^ bucket[None, None, :], DTYPE, EXACT)
        return tl.reshape(found, [LENGTH, COLUMNS])
    group, first = first_column // BUCKETS, first_column % BUCKETS
    code = tl.sum(tl.where(tl.arange(0, GROUPS)[None, :] == group, codes, 0), 1)
    return ones_at_zero(code[:, None] ^ (first + tl.arange(0, COLUMNS))[None, :], DTYPE, EXACT)


@triton.jit
def _pick(codes, first, LENGTH: tl.constexpr, GROUPS: tl.constexpr, HELD: tl.constexpr):
    """Return the HELD consecutive groups from `first` on, a multiple of HELD."""
    blocks = tl.reshape(codes, [LENGTH, GROUPS // HELD, HELD])
    this = tl.arange(0, GROUPS // HELD)[None, :, None] == first // HELD
    return tl.sum(tl.where(this, blocks, 0), 1)


@triton.jit
def _cut_off(x):
    """Return float32 numbers cut off to the digits of bfloat16: the rest is exact, too."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _in_two(x):
    high = _cut_off(x)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def _in_three(x):
    high = _cut_off(x)
    rest = x - high
    middle = _cut_off(rest)
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), (rest - middle).to(tl.bfloat16)


@triton.jit
def bfloat16_parts(x, PARTS: tl.constexpr):
    """Return PARTS bfloat16 parts of float32 numbers, the largest first: three have all digits."""
    return _in_two(x) if PARTS == 2 else _in_three(x)


@triton.jit
def dot_of_parts(member, rows):
    """Return the product of `member` and rows in parts, the smallest first."""
    found = tl.dot(member, rows[len(rows) - 1])
    for i in tl.static_range(1, len(rows)):
        found = tl.dot(member, rows[len(rows) - 1 - i], found)
    return found


@triton.jit
def add_products(sums, x, member, PARTS: tl.constexpr):
    """Return `sums` `[SIZE, COLUMNS]` plus the rows of `x` `[LENGTH, SIZE]` in each column.

    Args:
        sums: float32.
        x: a tile of any floating dtype; sums of float32 are as good as float32 sums of it, others
            are cut off to float32 at every step of a history.
        member: `[LENGTH, COLUMNS]`, 1 or 0.
        PARTS: as `parts` returns.
    """
    x = tl.trans(x)
    if PARTS == 0:
        sums = tl.dot(x.to(tl.float32), member, sums, input_precision="ieee")
    elif x.dtype == tl.float32:
        # Tensor cores cut off what they add to, again at every step: each tile begins from nothing.
        high, middle, low = bfloat16_parts(x, 3)
        sums += tl.dot(high, member, tl.dot(middle, member, tl.dot(low, member)))
    else:
        sums = tl.dot(x, member, sums)
    return sums


@triton.jit
def collect(member, rows, PARTS: tl.constexpr):
    """Return for each behaviour the sum of the float32 `rows` `[COLUMNS, SIZE]` it is member of.

    Args:
        member: `[LENGTH, COLUMNS]`, 1 or 0.
        rows: float32.
        PARTS: as `parts` returns.
    """
    if PARTS == 0:
        found = tl.dot(member, rows, input_precision="ieee")
    else:
        found = dot_of_parts(member, bfloat16_parts(rows, PARTS))
    return found


@triton.jit
def inverse_norm(square):
    """Return 1 / sqrt(square), and 0 where it is 0."""
    return tl.where(square > 0, tl.rsqrt(tl.where(square > 0, square, 1.0)), 0.0)
