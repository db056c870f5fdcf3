"""Exact attention as its definition: scores of all pairs, differentiable by autograd.

Target attention is padded: `[B, C, L]` scores for C queries and L behaviours of the largest user.
"""

import torch
from torch import Tensor

from hashtab.kernels.core.ragged import segment_of, to_padded


def target_attention_at(
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    scale: float,
    last: int | None,
) -> Tensor:
    """Return softmax(scale q K^T) V over the behaviours that each query sees, `[Q, Dv]`.

    Args:
        queries: `[Q, D]`.
        query_offsets: `[B + 1]` int64.
        cuts: `[Q]` int64, within the history of the query's user.
        keys: `[N, D]`.
        values: `[N, Dv]`.
        offsets: `[B + 1]` int64.
        scale: factor of the scores.
        last: behaviours a query sees at most, the latest; all when None.
    """
    scores = scale * to_padded(queries, query_offsets) @ to_padded(keys, offsets).mT
    position = torch.arange(scores.shape[2], device=cuts.device)
    end = to_padded(cuts[:, None], query_offsets)
    seen = position < end
    if last is not None:
        seen &= position >= end - last
    # Where nothing is seen, any finite score keeps the softmax and its gradient from NaN.
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(~seen.any(2, keepdim=True), 0)
    weights = scores.softmax(2) * seen
    interest = weights @ to_padded(values, offsets)
    user = segment_of(query_offsets, cuts.shape[0])
    rank = torch.arange(cuts.shape[0], device=cuts.device) - query_offsets[user]
    return interest[user, rank]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """Return softmax(scale q k^T) v over the positions less than `window` away, `[B, T, H, Dv]`.

    Args:
        q: `[B, T, H, D]`.
        k: `[B, T, H, D]`.
        v: `[B, T, H, Dv]`.
        window: positions that a query sees at most on one side, its own included.
        causal: whether later positions are hidden.
        lengths: `[B]` int64, what is no padding; all when None.
        scale: factor of the scores.
    """
    position = torch.arange(q.shape[1], device=q.device)
    after = position - position[:, None]
    seen = (after > -window) & (after < (1 if causal else window))
    if lengths is not None:
        valid = position < lengths[:, None]
        seen = (seen & valid[:, :, None] & valid[:, None])[:, None]
    scores = scale * torch.einsum("bthd,bshd->bhts", q, k)
    # Where nothing is seen, any finite score keeps the softmax and its gradient from NaN.
    nothing = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen, -torch.inf).masked_fill(nothing, 0).softmax(3) * seen
    return torch.einsum("bhts,bshd->bthd", weights, v)
