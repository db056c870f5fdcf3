"""The protocol that every history encoder follows."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from hashtab.kernels.core.checks import check_cuts, check_offsets
from hashtab.kernels.core.ragged import segment_of


class EmbeddedUsers(NamedTuple):
    """A batch of whole users, embedded. B users, N behaviours, Q samples.

    Attributes:
        behaviours: `[N, D]`, in time order within a user.
        history_offsets: `[B + 1]` int64, where each user's behaviours begin and end.
        candidates: `[Q, D]`.
        sample_offsets: `[B + 1]` int64, where each user's samples begin and end.
        cuts: `[Q]` int64, ascending within a user; a sample sees its user's first `cuts[i]`
            behaviours and nothing later.
    """

    behaviours: Tensor
    history_offsets: Tensor
    candidates: Tensor
    sample_offsets: Tensor
    cuts: Tensor

    def check(self) -> None:
        """Refuse offsets and cuts that do not fit the rows.

        Raises:
            ValueError: naming the one that does not.
        """
        samples = len(self.candidates)
        check_offsets("history_offsets", self.history_offsets, len(self.behaviours), "behaviours")
        check_offsets("sample_offsets", self.sample_offsets, samples, "samples")
        check_cuts(self.history_offsets, self.cuts, segment_of(self.sample_offsets, samples))


class HistoryEncoder(nn.Module, ABC):
    """Summarise a user's behaviours for each of the user's candidates.

    Attributes:
        output_size: length of the interest; 0 for an encoder that reads no history, else a
            multiple of D.
    """

    output_size: int

    @abstractmethod
    def forward(self, users: EmbeddedUsers) -> Tensor:
        """Return each sample's interest `[Q, output_size]`, zeros where it sees no behaviour."""
