"""The paper's pair: hash-sampled attention over the long history, exact over the recent one."""

import torch
from torch import Tensor

from hashtab.models.ctr.encoders.base import EmbeddedUsers, HistoryEncoder, ServedUsers


class LongShort(HistoryEncoder):
    """Concatenate the interests of two encoders.

    Args:
        long: encoder of the whole history.
        short: encoder of the recent one.
    """

    def __init__(self, long: HistoryEncoder, short: HistoryEncoder) -> None:
        super().__init__()
        self.output_size = long.output_size + short.output_size
        self.long = long
        self.short = short
        self.groups, self.buckets, self.last = long.groups, long.buckets, long.last
        self.looks_up, self.recent = long.looks_up, short.recent
        self.one_graph = long.one_graph and short.one_graph

    def forward(self, users: EmbeddedUsers) -> Tensor:
        """Return `[Q, 2 D]`."""
        return torch.cat([self.long(users), self.short(users)], dim=1)

    def serve(self, users: ServedUsers) -> Tensor:
        """Return `[U, C, 2 D]`."""
        return torch.cat([self.long.serve(users), self.short.serve(users)], dim=-1)

    def codes(self, vectors: Tensor) -> Tensor:
        """Return the long encoder's `[..., groups]`."""
        return self.long.codes(vectors)
