"""Index arithmetic for ragged batches of whole users."""

import torch
from torch import Tensor

from hashtab.kernels.core.ragged import segment_of


def visible_range(
    history_offsets: Tensor, sample_offsets: Tensor, cuts: Tensor, last: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return where each sample's visible behaviours begin and end in the flat history.

    Args:
        history_offsets: `[B + 1]` int64.
        sample_offsets: `[B + 1]` int64.
        cuts: `[Q]` int64, behaviours of its user that a sample sees.
        last: at most so many of them, the latest; all when None.

    Returns:
        Begin and end, both `[Q]` int64; equal where a sample sees nothing.
    """
    first = history_offsets[segment_of(sample_offsets, len(cuts))]
    skipped = torch.zeros_like(cuts) if last is None else (cuts - last).clamp(min=0)
    return first + skipped, first + cuts


def pairs(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """List every (sample, visible behaviour) pair.

    Args:
        begin: `[Q]` int64.
        end: `[Q]` int64, not below `begin`.

    Returns:
        Sample index and behaviour index of each pair, both `[P]` int64, ordered by sample.
    """
    counts = end - begin
    samples = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    before = counts.cumsum(0) - counts
    rank = torch.arange(len(samples), device=counts.device) - before[samples]
    return samples, begin[samples] + rank
