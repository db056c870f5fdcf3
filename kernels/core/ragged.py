"""The ragged layout: flat rows `[N, ...]` and offsets `[B + 1]`; padded input is converted here."""

import torch
from torch import Tensor

from hashtab.kernels.core.checks import check_lengths


def to_ragged(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the padding of a batch of histories.

    Args:
        padded: `[B, L, D]`, each user's behaviours first, then padding of any content.
        lengths: `[B]` int64, behaviours of each user, between 0 and L.

    Returns:
        Values `[N, D]` and offsets `[B + 1]` int64, where N is the sum of the lengths.

    Raises:
        TypeError: `lengths` are not int64.
        ValueError: shapes disagree, or a length lies outside 0 .. L.
    """
    if padded.dim() != 3 or lengths.shape != padded.shape[:1]:
        raise ValueError(
            "padded must be [B, L, D] and lengths [B], got "
            f"{tuple(padded.shape)} and {tuple(lengths.shape)}"
        )
    if lengths.dtype != torch.int64:
        raise TypeError(f"lengths must be int64, got {lengths.dtype}")
    limit = padded.shape[1]
    check_lengths(lengths, limit)
    valid = torch.arange(limit, device=padded.device) < lengths[:, None]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return padded[valid], offsets


def segment_of(offsets: Tensor, n: int) -> Tensor:
    """Return the segment of each of the `n` rows under `offsets` `[B + 1]`: `[n]` int64."""
    segments = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(segments, offsets.diff(), output_size=n)


def to_padded(values: Tensor, offsets: Tensor) -> Tensor:
    """Return `[B, L, D]` with zeros after each segment's rows; L is the longest segment."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    valid = torch.arange(longest, device=values.device) < lengths[:, None]
    return values.new_zeros(*valid.shape, values.shape[1]).masked_scatter(valid[..., None], values)
