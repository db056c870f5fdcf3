"""The paper's pair: hash-sampled attention over the long history, exact over the recent one."""

import torch
from torch import Tensor

from hashtab.models.ctr.encoders.base import EmbeddedUsers, HistoryEncoder


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

    def forward(self, users: EmbeddedUsers) -> Tensor:
        """Return `[Q, 2 D]`."""
        return torch.cat([self.long(users), self.short(users)], dim=1)
