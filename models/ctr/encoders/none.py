"""No history at all: the rival that shows what the history is worth."""

from torch import Tensor

from hashtab.models.ctr.encoders.base import HistoryEncoder


class NoHistory(HistoryEncoder):
    """Return an interest of length 0."""

    output_size = 0

    def forward(
        self,
        behaviours: Tensor,
        history_offsets: Tensor,
        candidates: Tensor,
        sample_offsets: Tensor,
        cuts: Tensor,
    ) -> Tensor:
        """Return `[Q, 0]`."""
        return candidates[:, :0]
