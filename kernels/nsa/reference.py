"""Native sparse attention as its definition: masks over all pairs, differentiable by autograd.

Shape suffixes: B batch, T queries, S keys, K key heads, G query heads of a key head, N compression
blocks, J selection blocks, C choices of a query. Equation numbers are those of arXiv 2502.11089.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hashtab.kernels.nsa.blocks import Layout, block_counts, zero_padding


class Keys(NamedTuple):
    """Keys `[B, S, K, D]` and values `[B, S, K, Dv]` of one branch."""

    k: Tensor
    v: Tensor


def attend(
    q: Tensor,
    compressed: Keys,
    selection: Keys,
    window: Keys,
    gates: Tensor,
    layout: Layout,
    lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the gated sum of the three branches, `[B, T, H, Dv]` (eq. 5).

    Args:
        q: `[B, T, H, D]`.
        compressed: of the N compression blocks.
        selection: of the T positions, for the selection branch.
        window: of the T positions, for the window branch.
        gates: `[B, T, H, 3]`: compression, selection, window.
        layout: what is seen.
        lengths: `[B]` int64, what is no padding; all when None.
        scale: factor of the scores.
    """
    grouped = scale * q.unflatten(2, (compressed.k.shape[2], -1))
    if lengths is not None:
        selection = Keys(*(zero_padding(x, lengths) for x in selection))
        window = Keys(*(zero_padding(x, lengths) for x in window))
    weights = compressed_weights(grouped, compressed.k, layout, lengths)
    chosen = choose(importance(weights, layout), layout, lengths)
    branches = (
        _mix(weights, compressed.v),
        _branch(grouped, selection, selected_keys(chosen, layout, lengths)),
        _branch(grouped, window, window_keys(layout, lengths, q.device)),
    )
    return (torch.stack(branches, dim=-1) * gates[..., None, :]).sum(-1)


def compressed_weights(
    grouped: Tensor, k: Tensor, layout: Layout, lengths: Tensor | None
) -> Tensor:
    """Return the softmax over the compression blocks that a query sees, `[B, K, G, T, N]` (eq. 8).

    Args:
        grouped: queries times the scale, `[B, T, K, G, D]`.
        k: `[B, N, K, D]`.
        layout: what is seen.
        lengths: `[B]` int64; None for all.
    """
    scores = torch.einsum("btkgd,bnkd->bkgtn", grouped, k)
    return _softmax(scores, seen_blocks(layout, lengths, k.device)[:, None, None])


def seen_blocks(layout: Layout, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Return which compression blocks a query sees, `[B, T, N]`, B = 1 without lengths (eq. 7)."""
    block = torch.arange(layout.n_blocks, device=device)
    seen = _valid_queries(layout, lengths, device)[:, :, None]
    if lengths is not None:
        seen = seen & (block < block_counts(lengths, layout.block, layout.stride)[:, None])[:, None]
    if layout.causal:
        # A partial block never ends: more positions to come must not change what was seen.
        last = block * layout.stride + layout.block - 1
        return seen & (last <= torch.arange(layout.tokens, device=device)[:, None])
    return seen.expand(-1, -1, layout.n_blocks)


def importance(weights: Tensor, layout: Layout) -> Tensor:
    """Return the importance of each selection block to each query, `[B, K, T, J]` (eq. 9, 10).

    Eq. 9 counts, for whole multiples of the stride, how many strides two blocks share; shared
    positions over the stride say the same of any sizes.

    Args:
        weights: of the compression blocks, `[B, K, G, T, N]`.
        layout: where blocks lie.
    """
    group = weights.sum(2)
    return group @ overlap(layout, group.device).to(group.dtype)


def overlap(layout: Layout, device: torch.device) -> Tensor:
    """Return the positions that compression and selection blocks share over the stride, `[N, J]`.

    A partial block counts as a whole one, so neither T nor padding changes any weight.
    """
    begin = torch.arange(layout.n_blocks, device=device)[:, None] * layout.stride
    start = torch.arange(layout.n_choices, device=device) * layout.select_block
    end = torch.minimum(begin + layout.block, start + layout.select_block)
    return (end - torch.maximum(begin, start)).clamp(min=0) / layout.stride


def choose(importance: Tensor, layout: Layout, lengths: Tensor | None) -> Tensor:
    """Return the selection blocks of each query, `[B, K, T, C]`, -1 where it has fewer.

    The first is the query's own block; the others follow by falling importance, equal ones by
    position. C is the least of `n_select` and J.

    Args:
        importance: `[B, K, T, J]`, without a gradient.
        layout: what is seen.
        lengths: `[B]` int64; None for all.
    """
    ranks = torch.arange(layout.n_choices, device=importance.device)
    own = torch.arange(layout.tokens, device=importance.device)[:, None] // layout.select_block
    # NOTE[DIFF]: the paper ranks the importance as it is. Compared in half precision, blocks that
    # tie but for rounding tie in every implementation and runtime, and their position decides.
    left = importance.detach().half().float()
    left = left.masked_fill(ranks == own, torch.inf)
    left = left.masked_fill(~_choices(layout, lengths, left.device)[:, None], -1)
    chosen = []
    for _ in range(min(layout.n_select, layout.n_choices)):
        best = left.argmax(-1, keepdim=True)
        taken = ranks == best
        found = ((left >= 0) & taken).any(-1, keepdim=True)
        chosen.append(torch.where(found, best, -1))
        left = left.masked_fill(taken, -1)
    return torch.cat(chosen, dim=-1)


def _choices(layout: Layout, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Return the selection blocks that a query may have, `[B, T, J]`, B = 1 without lengths."""
    start = torch.arange(layout.n_choices, device=device) * layout.select_block
    allowed = _valid_queries(layout, lengths, device)[:, :, None]
    if layout.causal:
        allowed = allowed & (start <= torch.arange(layout.tokens, device=device)[:, None])
    if lengths is not None:
        allowed = allowed & (start < lengths[:, None])[:, None]
    return allowed.expand(-1, -1, layout.n_choices)


def selected_keys(chosen: Tensor, layout: Layout, lengths: Tensor | None) -> Tensor:
    """Return which positions a query's blocks hold, `[B, K, 1, T, S]` (eq. 11, 12)."""
    position = torch.arange(layout.tokens, device=chosen.device)
    ranks = torch.arange(layout.n_choices, device=chosen.device)
    taken = (chosen[..., None] == ranks).any(-2)
    seen = taken.index_select(-1, position // layout.select_block)
    if layout.causal:
        seen = seen & (position <= position[:, None])
    if lengths is not None:
        seen = seen & (position < lengths[:, None])[:, None, None]
    return seen[:, :, None]


def window_keys(layout: Layout, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Return which positions lie in a query's window, `[B, 1, 1, T, S]`, B = 1 without lengths."""
    position = torch.arange(layout.tokens, device=device)
    after = position - position[:, None]
    seen = (after > -layout.window) & (after < (1 if layout.causal else layout.window))
    valid = _valid_queries(layout, lengths, device)
    return (seen & valid[:, :, None] & valid[:, None])[:, None, None]


def _valid_queries(layout: Layout, lengths: Tensor | None, device: torch.device) -> Tensor:
    position = torch.arange(layout.tokens, device=device)[None]
    return position >= 0 if lengths is None else position < lengths[:, None]


def _branch(grouped: Tensor, keys: Keys, seen: Tensor) -> Tensor:
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, keys.k)
    return _mix(_softmax(scores, seen), keys.v)


def _softmax(scores: Tensor, seen: Tensor) -> Tensor:
    # Where nothing is seen, any finite score keeps the softmax and its gradient from NaN.
    nothing = ~seen.any(-1, keepdim=True)
    return scores.masked_fill(~seen, -torch.inf).masked_fill(nothing, 0).softmax(-1) * seen


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2, 3)
