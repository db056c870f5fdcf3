"""The protocol that every history encoder follows."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class HistoryEncoder(nn.Module, ABC):
    """Summarise a user's behaviours for each of the user's candidates.

    Attributes:
        output_size: length of the interest vector; 0 for an encoder that reads no history.
    """

    output_size: int

    @abstractmethod
    def forward(
        self,
        behaviours: Tensor,
        history_offsets: Tensor,
        candidates: Tensor,
        sample_offsets: Tensor,
        cuts: Tensor,
    ) -> Tensor:
        """Return each sample's interest.

        Args:
            behaviours: `[N, D]`, embedded behaviours of all users, in time order within a user.
            history_offsets: `[B + 1]` int64, where each user's behaviours begin and end.
            candidates: `[Q, D]`, embedded candidates of all users.
            sample_offsets: `[B + 1]` int64, where each user's samples begin and end.
            cuts: `[Q]` int64, ascending within a user; a sample sees its user's first `cuts[i]`
                behaviours and nothing later.

        Returns:
            `[Q, output_size]`; zeros where a sample sees no behaviour.
        """
