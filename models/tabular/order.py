"""An order of columns that makes neighbours of like ones, so that blocks of them mean something."""

import torch
from torch import Tensor

from hashtab.models.tabular.embedding import Encoded

_ROWS = 2000  # enough to see which columns belong together


def correlation_order(rows: Encoded) -> Tensor:
    """Return a permutation `[T]` int64 of the tokens of `rows` `[1, F, N]`, numbers first.

    A chain: after each column comes the one that correlates with it most, by absolute value, among
    those left. Categories count by their codes, missing numbers as the median.
    """
    rows = rows.some(_ROWS)
    values = torch.cat([rows.linear[0], rows.codes[0].to(rows.linear)])
    values = values - values.mean(1, keepdim=True)
    values = values / values.norm(dim=1, keepdim=True).clamp_min(1e-12)
    likeness = (values @ values.T).abs_()
    last = int(likeness.sum(1).argmax())
    order = [last]
    for _ in range(1, len(likeness)):
        likeness[:, last] = -1
        last = int(likeness[last].argmax())
        order.append(last)
    return torch.tensor(order)
