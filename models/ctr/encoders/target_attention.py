"""Exact softmax target attention over the last behaviours or over all of them."""

import math

import torch
from torch import Tensor, nn

from hashtab.kernels import dense
from hashtab.models.ctr.encoders.base import EmbeddedUsers, HistoryEncoder, ServedUsers


class TargetAttention(HistoryEncoder):
    """Let the candidate attend to the behaviours before it, with learned queries and keys.

    Both projections start as the identity, so that likeness of embeddings is the first guess.

    Args:
        size: length D of a behaviour's vector.
        last: behaviours that a sample sees, the latest; all of them when None.

    Attributes:
        impl: implementation of the kernel, as `hashtab.kernels.dense` names them.
    """

    impl: dense.TargetImpl = "auto"

    def __init__(self, size: int, last: int | None = None) -> None:
        super().__init__()
        self.output_size = size
        self.last = self.recent = last
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)

    def forward(self, users: EmbeddedUsers) -> Tensor:
        """Return `[Q, D]`."""
        return dense.target_attention_at(
            self.query(users.candidates),
            users.sample_offsets,
            users.cuts,
            users.behaviours,
            users.history_offsets,
            keys=self.key(users.behaviours),
            last=self.last,
            impl=self.impl,
        )

    def serve(self, users: ServedUsers) -> Tensor:
        """Return `[U, C, D]`."""
        size = users.candidates.shape[-1]
        likeness_UCR = self.query(users.candidates) @ self.key(users.recent).mT / math.sqrt(size)
        hidden = torch.where(users.recent_mask, 0.0, float("-inf"))
        some = (users.recent_lengths > 0)[:, None, None]
        # A row of nothing but -inf has no softmax.
        weight_UCR = torch.where(some, likeness_UCR + hidden, 0.0).softmax(-1) * some
        return weight_UCR @ users.recent
