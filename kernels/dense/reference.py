"""Softmax target attention as its definition: scores of all pairs of a user, differentiable.

Padded: `[B, C, L]` scores for C queries and L behaviours of the largest user.
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
