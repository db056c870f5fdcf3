"""SDIM: hash-sampled attention over the whole history (arXiv 2205.10249)."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from hashtab.kernels import sdim
from hashtab.models.ctr.encoders.base import EmbeddedUsers, HistoryEncoder


class HashSampledAttention(HistoryEncoder):
    """Read the buckets of the user's behaviours that the candidate falls into.

    Args:
        size: length D of a behaviour's vector.
        planes: number M of hash planes.
        tau: bits of a group's code; must divide `planes`.
        last: behaviours that a sample sees, the latest; all of them when None.

    Attributes:
        planes: `[D, M]` float32, drawn once from N(0, 1); a buffer, so the state dict carries it
            and training, evaluation and serving hash alike. It stays float32 in a model that is
            cast to another dtype: rounded planes would move vectors to other buckets.
    """

    planes: Tensor

    def __init__(self, size: int, planes: int, tau: int, last: int | None = None) -> None:
        super().__init__()
        self.output_size = size
        self.tau = tau
        self.last = last
        self.register_buffer("planes", torch.randn(size, planes, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        planes = self.planes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.planes.dtype != planes.dtype:
            self.planes = planes.to(self.planes.device)
        return self

    def forward(self, users: EmbeddedUsers) -> Tensor:
        """Return `[Q, D]`."""
        return sdim.attend_at(
            users.behaviours,
            users.history_offsets,
            users.candidates,
            users.sample_offsets,
            users.cuts,
            self.planes,
            self.tau,
            last=self.last,
        )
