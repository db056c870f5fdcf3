"""A kernel with the faults that compiling is checked for, to see that the check finds them."""

# Triton's functions take pointers and numbers of the device, which annotations cannot tell apart.
# ruff: noqa: ANN001
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl


@triton.jit
def _greedy(x, y, SIZE: tl.constexpr) -> None:
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tile = tl.load(x + row * SIZE + column)
    wide = tl.load(x + row * SIZE + tl.arange(0, 16)[None, :])
    product = tl.dot(wide, tl.trans(wide), input_precision="ieee")
    tl.store(y + row * SIZE + column, (product - tl.max(product)) * tile - tl.max(tile))


def launch() -> None:
    """Hold more than the registers of a warp in one, and multiply without tensor cores."""
    x = torch.empty(64, 64, device="meta")
    _greedy[(1,)](x, torch.empty_like(x), SIZE=64, num_warps=1)
