"""Softmax target attention by matrix products of one user's blocks, on any device.

A block of queries reads up to its largest cut and, with `last`, from its smallest beginning. The
forward pass keeps the log-sum-exp of each query only; the backward pass computes the scores again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_SCORES_AT_ONCE = 100_000  # of one block: as float32 they stay in a core's second-level cache
_FEWEST_QUERIES = 16


class _Block(NamedTuple):
    """Consecutive queries of one user, and the behaviours that any of them sees.

    Attributes:
        queries: slice of the `[Q, ...]` rows.
        seen: slice of the `[N, ...]` rows.
        end: `[b, 1]`, where each query's behaviours end, counted from `seen`.
        shared: behaviours counted from `seen` that all these queries see: from, to.
    """

    queries: slice
    seen: slice
    end: Tensor
    shared: tuple[int, int]


def _blocks(
    query_offsets: Tensor, cuts: Tensor, offsets: Tensor, last: int | None
) -> Iterator[_Block]:
    times: list[int] = cuts.tolist()
    starts: list[int] = offsets.tolist()
    bounds: list[int] = query_offsets.tolist()
    for user, behind in enumerate(bounds[1:]):
        first = bounds[user]
        while first < behind:
            begin = max(0, times[first] - last) if last is not None else 0
            rows = slice(first, _block_end(times, first, behind, begin))
            low, high = times[rows.start], times[rows.stop - 1]
            latest_begin = max(0, high - last) if last is not None else 0
            seen = slice(starts[user] + begin, starts[user] + high)
            end = (cuts[rows] - begin)[:, None]
            yield _Block(rows, seen, end, (latest_begin - begin, low - begin))
            first = rows.stop


def _block_end(times: list[int], first: int, behind: int, begin: int) -> int:
    """Return where the block of queries that starts at `first` ends, `behind` at the latest."""
    end = min(first + _FEWEST_QUERIES, behind)
    while end < behind and (end + 1 - first) * (times[end] - begin) <= _SCORES_AT_ONCE:
        end += 1
    return end


def _scores(block: _Block, queries: Tensor, keys: Tensor, last: int | None) -> Tensor:
    """Return `[b, n]` scores, -inf where a query does not see a behaviour."""
    scores = queries[block.queries] @ keys[block.seen].mT
    position = torch.arange(scores.shape[1], device=scores.device)
    begin, end = block.shared
    tail = position[end:] >= block.end
    scores[:, end:].masked_fill_(tail, -torch.inf)
    if last is not None:
        scores[:, :begin].masked_fill_(position[:begin] < block.end - last, -torch.inf)
    return scores


def attend_at(
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    scale: float,
    last: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the interest `[Q, Dv]` and the log-sum-exp of each query's scores `[Q]`."""
    interest = values.new_zeros(cuts.shape[0], values.shape[1])
    log_sums = values.new_zeros(cuts.shape[0])
    scaled = queries * scale
    for block in _blocks(query_offsets, cuts, offsets, last):
        if block.seen.start == block.seen.stop:
            continue
        scores = _scores(block, scaled, keys, last)
        top = _finite(scores.amax(1, keepdim=True))
        weights = scores.sub_(top).exp_()
        sums = weights.sum(1, keepdim=True)
        # A query that sees nothing has a sum of 0 and an interest of zeros.
        divisor = torch.where(sums > 0, sums, 1)
        torch.div(weights @ values[block.seen], divisor, out=interest[block.queries])
        log_sums[block.queries] = (top + divisor.log()).squeeze(1)
    return interest, log_sums


def attend_at_backward(
    grad: Tensor,
    interest: Tensor,
    log_sums: Tensor,
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    scale: float,
    last: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries `[Q, D]`, keys `[N, D]` and values `[N, Dv]`."""
    # Contiguous, whatever the strides of the inputs: that is what the fake results promise.
    grad_queries = queries.new_zeros(queries.shape)
    grad_keys = keys.new_zeros(keys.shape)
    grad_values = values.new_zeros(values.shape)
    scaled = queries * scale
    along = (grad * interest).sum(1, keepdim=True)
    for block in _blocks(query_offsets, cuts, offsets, last):
        if block.seen.start == block.seen.stop:
            continue
        rows, seen = block.queries, block.seen
        weights = _scores(block, scaled, keys, last).sub_(log_sums[rows, None]).exp_()
        grad_values[seen].addmm_(weights.mT, grad[rows])
        grad_scores = (grad[rows] @ values[seen].mT).sub_(along[rows]).mul_(weights)
        torch.mm(grad_scores, keys[seen], out=grad_queries[rows])
        grad_keys[seen].addmm_(grad_scores.mT, scaled[rows])
    return grad_queries.mul_(scale), grad_keys, grad_values


def _finite(top: Tensor) -> Tensor:
    """Replace the -inf of a query that sees nothing, for -inf - -inf is NaN."""
    return top.masked_fill(top == -torch.inf, 0)
