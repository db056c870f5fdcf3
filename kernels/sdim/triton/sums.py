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


def spread_groups(packing: Packing) -> int:
    """Return how long the products are that spread codes: launch shapes depend on it."""
    return max(16, packing.padded_groups)


# Of fewer rows of 16 bits that are hashed and summed, Triton 3.6 multiplies some that it has begun
# to overwrite.
LEAST_HASHED = 64


def most_rows(packing: Packing) -> int:
    """Return how many rows a tile of float32 (on older GPUs, any) may have.

    With more for many groups ptxas (CUDA 12.8) makes descriptors of products from a register that
    it never wrote; older GPUs, which have no descriptors, spill.
    """
    return 32 if packing.padded_groups > 16 else 256


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
def code_numbers(codes, EXACT: tl.constexpr):
    """Return codes as numbers of the products that spread them: float16, which holds all.

    EXACT is Triton's interpreter, which multiplies float32.
    """
    return codes.to(tl.float32 if EXACT else tl.float16)


@triton.jit
def code_factor(codes, LENGTH: tl.constexpr, GROUPS: tl.constexpr, EXACT: tl.constexpr):
    """Return codes `[LENGTH, GROUPS]` as a factor `[LENGTH, 16 or GROUPS]` for `members`.

    Behind fewer groups than a product takes they come again, where `group_factor` has zeros.
    """
    if GROUPS < 16:
        again = tl.broadcast_to(codes[:, None, :], [LENGTH, 16 // GROUPS, GROUPS])
        codes = tl.reshape(again, [LENGTH, 16])
    return code_numbers(codes, EXACT)


@triton.jit
def group_factor(group, GROUPS: tl.constexpr, EXACT: tl.constexpr):
    """Return `[COLUMNS, 16 or GROUPS]`, 1 where a column is of a group, for `members`."""
    here = group[:, None] == tl.arange(0, 16 if GROUPS < 16 else GROUPS)[None, :]
    return code_numbers(here, EXACT)


@triton.jit
def columns_of_table(
    first_line,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    BUCKETS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Return `group_factor` and codes of COLUMNS rows of a table `[GROUPS, BUCKETS]`."""
    line = first_line + tl.arange(0, COLUMNS)
    of_group = group_factor(line // BUCKETS, GROUPS, EXACT)
    return of_group, code_numbers(line % BUCKETS, EXACT)


@triton.jit
def members(of_group, codes, wanted, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """Return `[COLUMNS, LENGTH]`, 1 where a row has the code that a column wants, else 0.

    A product with ones spreads the rows' codes over the columns, where it leaves them as the next
    product takes its first factor, with no word between threads.

    Args:
        of_group: each column's group, from `group_factor`.
        codes: of rows, from `code_factor`.
        wanted: `[COLUMNS]`, of `code_numbers`.
        DTYPE: of the rows that the result is multiplied with; in parts if float32.
        EXACT: whether in Triton's interpreter.
    """
    if EXACT:
        found = tl.dot(of_group, tl.trans(codes), input_precision="ieee")
    else:
        found = tl.dot(of_group, tl.trans(codes), out_dtype=tl.float16)
    return _ones_where_equal(found, wanted[:, None], DTYPE, EXACT)


@triton.jit
def members_of_rows(codes, of_group, wanted, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """Return `members` as `[LENGTH, COLUMNS]`."""
    if EXACT:
        found = tl.dot(codes, tl.trans(of_group), input_precision="ieee")
    else:
        found = tl.dot(codes, tl.trans(of_group), out_dtype=tl.float16)
    return _ones_where_equal(found, wanted[None, :], DTYPE, EXACT)


@triton.jit
def _ones_where_equal(x, y, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """Return 1 where float16 numbers are equal, else 0, as a factor for rows of DTYPE.

    A comparison, of which LLVM makes five instructions for two numbers; here are two.
    """
    if EXACT:
        return (x == y).to(tl.float32)
    ONES: tl.constexpr = "0x3C003C00" if tl.float16 == DTYPE else "0x3F803F80"
    found = tl.inline_asm_elementwise(
        "{ .reg .b32 same; set.eq.u32.f16x2 same, $1, $2; and.b32 $0, same, " + ONES + "; }",
        "=r,r,r",
        [x, y],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )
    return found.to(tl.float16 if tl.float16 == DTYPE else tl.bfloat16, bitcast=True)


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
def add_products(sums, member, x, PARTS: tl.constexpr):
    """Return `sums` `[COLUMNS, SIZE]` plus the rows of `x` `[LENGTH, SIZE]` in each column.

    Args:
        sums: float32.
        member: `[COLUMNS, LENGTH]`, as `members` returns for the dtype of `x`.
        x: a tile of any floating dtype; sums of float32 are as good as float32 sums of it, others
            are cut off to float32 at every step of a history.
        PARTS: as `parts` returns.
    """
    if PARTS == 0 or x.dtype == tl.float32:
        # Tensor cores cut off what they add to, again at every step: each tile begins from nothing.
        sums += collect(member, x.to(tl.float32), PARTS)
    else:
        sums = tl.dot(member, x, sums)
    return sums


@triton.jit
def collect(member, rows, PARTS: tl.constexpr):
    """Return for each row of `member` the sum of the float32 `rows` that it says.

    Args:
        member: `[A, B]`, 1 or 0 in bfloat16, or float32 where PARTS is 0.
        rows: `[B, SIZE]` float32.
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


@triton.jit
def norm_gradient(sums, upstream, groups: tl.constexpr):
    """Take gradients `[LINES, SIZE]` of normalised sums, averaged over groups, to the sums."""
    scale = inverse_norm(tl.sum(sums * sums, 1))
    unit = sums * scale[:, None]
    along = tl.sum(unit * upstream, 1)
    return (upstream - unit * along[:, None]) * (scale / groups)[:, None]
