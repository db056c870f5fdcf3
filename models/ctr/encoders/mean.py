"""Mean pooling: every candidate sees the average of the behaviours before it."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hashtab.models.ctr.encoders.base import TABLE_SCALE, EmbeddedUsers, HistoryEncoder, ServedUsers
from hashtab.models.ctr.ragged import visible_range


class MeanPooling(HistoryEncoder):
    """Average the behaviours that a sample sees.

    Args:
        size: length D of a behaviour's vector.
        last: behaviours that a sample sees, the latest; all of them when None.
    """

    def __init__(self, size: int, last: int | None = None) -> None:
        super().__init__()
        self.output_size = size
        self.last = last
        self.groups = self.buckets = 1
        self.needs_count = True

    def forward(self, users: EmbeddedUsers) -> Tensor:
        """Return `[Q, D]`."""
        begin, end = visible_range(
            users.history_offsets, users.sample_offsets, users.cuts, self.last
        )
        # One running sum over a whole batch would lose float32's digits in its differences.
        running = pad(users.behaviours.double().cumsum(0), (0, 0, 1, 0))
        total = (running[end] - running[begin]).to(users.behaviours.dtype)
        return total / (end - begin).clamp(min=1)[:, None]

    def serve(self, users: ServedUsers) -> Tensor:
        """Return `[U, C, D]`."""
        total = users.table[:, 0, 0] / TABLE_SCALE
        mean = total / users.behaviours.clamp(min=1)[:, None]
        return mean[:, None].expand_as(users.candidates)

    def codes(self, vectors: Tensor) -> Tensor:
        """Return `[..., 1]`: all vectors share one bucket."""
        return torch.zeros_like(vectors[..., :1], dtype=torch.int64)
