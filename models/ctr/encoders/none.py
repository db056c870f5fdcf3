"""No history at all: the rival that shows what the history is worth."""

from torch import Tensor

from hashtab.models.ctr.encoders.base import EmbeddedUsers, HistoryEncoder, ServedUsers


class NoHistory(HistoryEncoder):
    """Return an interest of length 0."""

    output_size = 0

    def forward(self, users: EmbeddedUsers) -> Tensor:
        """Return `[Q, 0]`."""
        return users.candidates[:, :0]

    def serve(self, users: ServedUsers) -> Tensor:
        """Return `[U, C, 0]`."""
        return users.candidates[..., :0]
