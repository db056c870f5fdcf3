"""The protocol that every history encoder follows."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class EmbeddedUsers(NamedTuple):
    """A batch of whole users, embedded. B users, N behaviours, Q samples.

    Attributes:
        behaviours: `[N, D]`, in time order within a user; float32, under autocast its dtype.
        history_offsets: `[B + 1]` int64, where each user's behaviours begin and end.
        candidates: `[Q, D]`, in the dtype of the behaviours.
        sample_offsets: `[B + 1]` int64, where each user's samples begin and end.
        cuts: `[Q]` int64, ascending within a user; a sample sees its user's first `cuts[i]`
            behaviours and nothing later.
    """

    behaviours: Tensor
    history_offsets: Tensor
    candidates: Tensor
    sample_offsets: Tensor
    cuts: Tensor


TABLE_SCALE = 1 << 16  # of the fixed point that served tables are kept in


class ServedUsers(NamedTuple):
    """What a scorer knows of its users at request time. U users, C candidates each.

    Attributes:
        candidates: `[U, C, D]`.
        buckets: `[U, C, G]`, the candidates' buckets as rows of a user's table `[G * buckets, D]`;
            empty for an encoder that does not look them up.
        table: `[U, G, buckets, D]`, sums of behaviours by bucket, in units of 1 / `TABLE_SCALE`.
        behaviours: `[U]` int64, how many behaviours the sums hold.
        recent: `[U, R, D]`, the latest behaviours in time order, R at least 1; padding at the end.
        recent_lengths: `[U]` int64, how many of them are behaviours.
    """

    candidates: Tensor
    buckets: Tensor
    table: Tensor
    behaviours: Tensor
    recent: Tensor
    recent_lengths: Tensor

    @property
    def recent_mask(self) -> Tensor:
        """`[U, 1, R]`, true where there is a behaviour."""
        position = torch.arange(self.recent.shape[1], device=self.recent.device)
        return position < self.recent_lengths[:, None, None]


class HistoryEncoder(nn.Module, ABC):
    """Summarise a user's behaviours for each of the user's candidates.

    In training it reads whole histories (`forward`). In serving it reads what is kept of a user
    (`serve`): a table of sums, if it declares `groups`, and the latest behaviours, if it declares
    `recent`.

    Attributes:
        output_size: length of the interest; 0 for an encoder that reads no history, else a
            multiple of D.
        groups: of the table; 0 for an encoder that reads none.
        buckets: of a group of the table.
        looks_up: whether it reads the buckets that a candidate falls into.
        needs_count: whether it reads how many behaviours the table holds.
        recent: latest behaviours that it reads one by one; None for all, which no one can keep.
        last: behaviours that a sample sees, the latest; all of them when None.
        one_graph: whether `forward` compiles to one graph for batches of all sizes: the size of
            nothing in it depends on what a batch holds.
    """

    output_size: int
    groups: int = 0
    buckets: int = 0
    looks_up: bool = False
    needs_count: bool = False
    recent: int | None = 0
    last: int | None = None
    one_graph: bool = True

    @abstractmethod
    def forward(self, users: EmbeddedUsers) -> Tensor:
        """Return each sample's interest `[Q, output_size]`, zeros where it sees no behaviour."""

    @abstractmethod
    def serve(self, users: ServedUsers) -> Tensor:
        """Return the interest `[U, C, output_size]` of each user's candidates, as `forward`."""

    def codes(self, vectors: Tensor) -> Tensor:
        """Return the buckets `[..., groups]` int64 that a vector `[..., D]` falls into."""
        raise NotImplementedError(f"{type(self).__name__} keeps no table")
