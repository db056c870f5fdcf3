"""The activation unit of the Deep Interest Network (Zhou et al., KDD 2018, arXiv 1706.06978)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from hashtab.kernels.core.precision import sums_dtype
from hashtab.models.ctr.encoders.base import EmbeddedUsers, HistoryEncoder, ServedUsers
from hashtab.models.ctr.ragged import pairs, visible_range


class DeepInterest(HistoryEncoder):
    """Weight each recent behaviour by a small network of it and the candidate, and sum.

    The weights are not normalised (section 4.3 of the paper: the intensity of interest is kept).
    The network reads candidate, behaviour, difference and product as in the paper. Its first layer
    is linear: what concerns one of the two alone is computed once for each candidate and behaviour
    and only the product's part for each pair. Pairs are listed one by one, so there is no padding
    to mask.

    How many pairs there are is known to the data alone, so no one graph holds it.

    Args:
        size: length D of a behaviour's vector.
        last: behaviours that a sample sees, the latest; the cost is linear in it for each sample.
        hidden: width of the activation unit.
    """

    one_graph = False

    def __init__(self, size: int, last: int, hidden: int = 36) -> None:
        super().__init__()
        self.output_size = size
        self.last = self.recent = last
        self.candidate = nn.Linear(size, hidden)
        self.behaviour = nn.Linear(size, hidden, bias=False)
        self.product = nn.Linear(size, hidden, bias=False)
        self.weight = nn.Linear(hidden, 1)

    def forward(self, users: EmbeddedUsers) -> Tensor:
        """Return `[Q, D]`."""
        begin, end = visible_range(
            users.history_offsets, users.sample_offsets, users.cuts, self.last
        )
        sample, behaviour = pairs(begin, end)
        s_PD = users.behaviours.index_select(0, behaviour)
        q_PD = users.candidates.index_select(0, sample)
        hidden_PH = self.product(q_PD * s_PD)
        hidden_PH = hidden_PH + self.candidate(users.candidates).index_select(0, sample)
        hidden_PH = hidden_PH + self.behaviour(users.behaviours).index_select(0, behaviour)
        real = sums_dtype(users.candidates.dtype)
        weighted_PD = (self.weight(relu(hidden_PH)) * s_PD).to(real)
        interest = torch.zeros_like(users.candidates, dtype=real).index_add(0, sample, weighted_PD)
        return interest.to(users.candidates.dtype)

    def serve(self, users: ServedUsers) -> Tensor:
        """Return `[U, C, D]`."""
        q_UC1D, s_U1RD = users.candidates[:, :, None], users.recent[:, None]
        hidden_UCRH = self.product(q_UC1D * s_U1RD)
        hidden_UCRH = hidden_UCRH + self.candidate(q_UC1D) + self.behaviour(s_U1RD)
        weight_UCR = self.weight(relu(hidden_UCRH))[..., 0] * users.recent_mask
        interest: Tensor = weight_UCR @ users.recent
        return interest
