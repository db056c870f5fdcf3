"""SDIM: hash-sampled attention over the whole history (arXiv 2205.10249)."""

import torch
from torch import Tensor

from hashtab.kernels import sdim
from hashtab.models.ctr.encoders.base import HistoryEncoder


class HashSampledAttention(HistoryEncoder):
    """Read the buckets of the user's behaviours that the candidate falls into.

    Args:
        size: length D of a behaviour's vector.
        planes: number M of hash planes.
        tau: bits of a group's code; must divide `planes`.
        last: behaviours that a sample sees, the latest; all of them when None.

    Attributes:
        planes: `[D, M]` float32, drawn once from N(0, 1); a buffer, so the state dict carries it
            and training, evaluation and serving hash alike.
    """

    planes: Tensor

    def __init__(self, size: int, planes: int, tau: int, last: int | None = None) -> None:
        super().__init__()
        self.output_size = size
        self.tau = tau
        self.last = last
        self.register_buffer("planes", torch.randn(size, planes))

    def forward(
        self,
        behaviours: Tensor,
        history_offsets: Tensor,
        candidates: Tensor,
        sample_offsets: Tensor,
        cuts: Tensor,
    ) -> Tensor:
        """Return `[Q, D]`."""
        return sdim.attend_at(
            behaviours,
            history_offsets,
            candidates,
            sample_offsets,
            cuts,
            self.planes,
            self.tau,
            last=self.last,
        )
