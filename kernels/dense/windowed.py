"""Softmax attention within a sliding window by matrix products of blocks, on any device.

A block of queries reads the keys that any of its windows reaches. The forward pass keeps the
log-sum-exp of each query only; the backward pass computes the scores again. Time and memory grow
with T times the window. Layout: `[B, H, T, D]`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_FEWEST_QUERIES = 64


class Window(NamedTuple):
    """Which keys a query at position t sees: those less than `size` positions away.

    Attributes:
        size: of the window, its own position included.
        causal: whether positions after t are hidden.
        lengths: `[B]`, positions of each sequence that are no padding; all when None.
    """

    size: int
    causal: bool
    lengths: Tensor | None

    def blocks(self, length: int) -> Iterator[tuple[slice, slice]]:
        """Yield consecutive queries, and the keys that any of them may see."""
        step = max(self.size, _FEWEST_QUERIES)
        for start in range(0, length, step):
            stop = min(start + step, length)
            behind = stop if self.causal else min(stop + self.size - 1, length)
            yield slice(start, stop), slice(max(0, start - self.size + 1), behind)

    def visible(self, rows: slice, seen: slice, device: torch.device) -> Tensor:
        """Return a mask that broadcasts to `[B, H, queries, keys]`."""
        query = torch.arange(rows.start, rows.stop, device=device)[:, None]
        key = torch.arange(seen.start, seen.stop, device=device)
        after = key - query
        mask = (after > -self.size) & (after < (1 if self.causal else self.size))
        if self.lengths is None:
            return mask
        lengths = self.lengths[:, None, None, None]
        return mask & (query < lengths) & (key < lengths)


def _scores(q: Tensor, k: Tensor, rows: slice, seen: slice, window: Window) -> Tensor:
    scores = q[:, :, rows] @ k[:, :, seen].mT
    return scores.masked_fill_(~window.visible(rows, seen, q.device), -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float) -> tuple[Tensor, Tensor]:
    """Return the result `[B, H, T, Dv]` and the log-sum-exp of each query's scores `[B, H, T]`."""
    out = v.new_zeros(v.shape)
    log_sums = v.new_zeros(v.shape[:-1])
    scaled = q * scale
    for rows, seen in window.blocks(q.shape[2]):
        scores = _scores(scaled, k, rows, seen, window)
        top = scores.amax(3, keepdim=True)
        # -inf - -inf would be NaN where a query is padding and sees nothing.
        top.masked_fill_(top == -torch.inf, 0)
        weights = scores.sub_(top).exp_()
        sums = weights.sum(3, keepdim=True)
        divisor = torch.where(sums > 0, sums, 1)
        out[:, :, rows] = weights @ v[:, :, seen] / divisor
        log_sums[:, :, rows] = (top + divisor.log()).squeeze(3)
    return out, log_sums


def attend_backward(
    grad: Tensor,
    out: Tensor,
    log_sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (q, k, v))
    scaled = q * scale
    along = (grad * out).sum(3, keepdim=True)
    for rows, seen in window.blocks(q.shape[2]):
        weights = _scores(scaled, k, rows, seen, window)
        weights.sub_(log_sums[:, :, rows, None]).exp_()
        grad_v[:, :, seen] += weights.mT @ grad[:, :, rows]
        grad_scores = (grad[:, :, rows] @ v[:, :, seen].mT - along[:, :, rows]) * weights
        grad_q[:, :, rows] = scale * (grad_scores @ k[:, :, seen])
        grad_k[:, :, seen] += grad_scores.mT @ scaled[:, :, rows]
    return grad_q, grad_k, grad_v
