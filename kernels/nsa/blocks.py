"""Where blocks lie: of compressed keys, and of keys that are selected. Nothing else decides it.

Compression block i begins at position i `stride` and holds `block` positions, or what is left of
them in the last block: blocks go on until every position lies in one, and a sequence shorter than
a block has one partial block. Selection block j holds the positions from j `select_block` up to the
next block. A padded sequence has the blocks that it would have without its padding.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """What a call attends to.

    Attributes:
        tokens: T, positions of a sequence.
        block: positions of a compression block, l in the paper.
        stride: distance between beginnings of compression blocks, d in the paper.
        select_block: positions of a selection block, l' in the paper.
        n_select: selection blocks of a query, n in the paper.
        window: positions that a query sees at most on each side, its own included.
        causal: whether later positions are hidden.
    """

    tokens: int
    block: int
    stride: int
    select_block: int
    n_select: int
    window: int
    causal: bool

    @property
    def n_blocks(self) -> int:
        """Compression blocks of a whole sequence."""
        return n_blocks(self.tokens, self.block, self.stride)

    @property
    def n_choices(self) -> int:
        """Selection blocks of a whole sequence."""
        return -(-self.tokens // self.select_block)


def n_blocks(tokens: int, block: int, stride: int) -> int:
    """Return the number of compression blocks of a sequence of `tokens` positions, at least 1."""
    return 1 + -(-max(tokens - block, 0) // stride)


def blocks(tokens: int, block: int, stride: int) -> Tensor:
    """Return the compression blocks that `native_sparse_attention` expects compressed keys of.

    Args:
        tokens: T, positions of a sequence, at least 1.
        block: positions of a block.
        stride: distance between beginnings of blocks, 1 .. block.

    Returns:
        `[N, 2]` int64: first position of each block, and the position after its last.

    Raises:
        ValueError: `tokens` or `block` is less than 1, or `stride` outside 1 .. block.

    >>> blocks(10, block=4, stride=3)
    tensor([[ 0,  4],
            [ 3,  7],
            [ 6, 10]])
    """
    check_blocks(tokens, block, stride)
    begin = torch.arange(n_blocks(tokens, block, stride)) * stride
    return torch.stack([begin, (begin + block).clamp(max=tokens)], dim=1)


def block_counts(lengths: Tensor, block: int, stride: int) -> Tensor:
    """Return how many compression blocks sequences of these lengths have; 0 for length 0."""
    steps = (lengths - block).clamp(min=0) + (stride - 1)
    return torch.where(lengths > 0, 1 + steps // stride, 0)


def check_blocks(tokens: int, block: int, stride: int) -> None:
    """Refuse sizes of compression blocks that leave positions out, or a sequence of none."""
    if tokens < 1:
        raise ValueError(f"sequences must have at least 1 position, got T = {tokens}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block=}")
    if not 1 <= stride <= block:
        raise ValueError(f"stride must lie within 1 .. block, got {stride=}, {block=}")


def compress_mean(k: Tensor, block: int, stride: int, lengths: Tensor | None = None) -> Tensor:
    """Return the mean of each compression block's positions, padding left out.

    Args:
        k: `[B, T, ...]`, keys or values.
        block: positions of a block.
        stride: distance between beginnings of blocks, 1 .. block.
        lengths: `[B]` int64, positions of each sequence that are no padding; None for all.

    Returns:
        `[B, N, ...]` in the dtype of `k`; zeros for blocks of padding alone.

    Raises:
        ValueError: T or `block` is less than 1, or `stride` outside 1 .. block.
    """
    tokens = k.shape[1]
    check_blocks(tokens, block, stride)
    if lengths is not None:
        k = zero_padding(k, lengths)
    counts = member_counts(tokens, block, stride, lengths, k.device)
    shape = (*counts.shape, *[1] * (k.dim() - 2))
    return block_sums(k, block, stride) / counts.clamp(min=1).to(k.dtype).view(shape)


def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Return `x` `[B, T, ...]` with zeros after each sequence's length, whatever lay there."""
    valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return x.masked_fill(~valid.view(*valid.shape, *[1] * (x.dim() - 2)), 0)


def member_counts(
    tokens: int, block: int, stride: int, lengths: Tensor | None, device: torch.device
) -> Tensor:
    """Return how many positions each block has that are no padding: `[B, N]`, B = 1 for all."""
    begin = torch.arange(n_blocks(tokens, block, stride), device=device) * stride
    end = torch.full((1, 1), tokens, device=device) if lengths is None else lengths[:, None]
    return (end - begin).clamp(min=0, max=block)


def block_sums(x: Tensor, block: int, stride: int) -> Tensor:
    """Return the sum over each block's positions, `[B, N, ...]` of `[B, T, ...]`."""
    return torch.stack([units.sum(2) for units in _units(x, block, stride)]).sum(0)


def block_members(x: Tensor, block: int, stride: int) -> Tensor:
    """Return each block's positions, `[B, N, block, ...]` of `[B, T, ...]`, zeros after the last.

    What a learned compression maps to one row a block.

    Args:
        x: `[B, T, ...]`, keys or values.
        block: positions of a block.
        stride: distance between beginnings of blocks, 1 .. block.

    Raises:
        ValueError: T or `block` is less than 1, or `stride` outside 1 .. block.
    """
    check_blocks(x.shape[1], block, stride)
    return torch.cat(_units(x, block, stride), dim=2)


def _units(x: Tensor, block: int, stride: int) -> list[Tensor]:
    """Return first, second, ... equal part of all blocks, each `[B, N, unit, ...]`.

    Blocks overlap in whole units, so slices do: gathering positions would scatter their gradients.
    """
    unit = math.gcd(block, stride)
    n, step = n_blocks(x.shape[1], block, stride), stride // unit
    missing = (n - 1) * stride + block - x.shape[1]
    padded = torch.nn.functional.pad(x, [0, 0] * (x.dim() - 2) + [0, missing])
    units = padded.unflatten(1, (-1, unit))
    last = (n - 1) * step + 1
    return [units[:, first : first + last : step] for first in range(block // unit)]
