"""The paper's pair: hash-sampled attention over the long history, exact over the recent one."""

import torch
from torch import Tensor

from hashtab.models.ctr.encoders.base import HistoryEncoder
from hashtab.models.ctr.encoders.sdim import HashSampledAttention
from hashtab.models.ctr.encoders.target_attention import TargetAttention


class LongShort(HistoryEncoder):
    """Concatenate SDIM over everything and exact attention over the last `window` behaviours.

    Args:
        long: encoder of the whole history.
        short: encoder of the recent one.
    """

    def __init__(self, long: HashSampledAttention, short: TargetAttention) -> None:
        super().__init__()
        self.output_size = long.output_size + short.output_size
        self.long = long
        self.short = short

    def forward(
        self,
        behaviours: Tensor,
        history_offsets: Tensor,
        candidates: Tensor,
        sample_offsets: Tensor,
        cuts: Tensor,
    ) -> Tensor:
        """Return `[Q, 2 D]`."""
        arguments = (behaviours, history_offsets, candidates, sample_offsets, cuts)
        return torch.cat([self.long(*arguments), self.short(*arguments)], dim=1)
