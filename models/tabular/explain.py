"""What drove a prediction: each column's share of it, by gradient times input."""

import torch
from torch import Tensor

from hashtab.models.tabular.embedding import Encoded
from hashtab.models.tabular.losses import Loss
from hashtab.models.tabular.network import TabNSANetwork


def contributions(network: TabNSANetwork, rows: Encoded, loss: Loss) -> Tensor:
    """Return `[N, T]`: the gradient of an output with respect to each token, times the token.

    A token's mean over the given rows is its baseline, so a column that is alike in all rows has
    driven nothing. To first order the shares of a row add up to what its output differs from that
    of the mean row.

    Args:
        network: fitted networks; their answers are averaged.
        rows: `[1, F, N]`.
        loss: says which output of a row is explained.
    """
    size = network.rows_at_once()
    parts = [Encoded(*part) for part in zip(*(x.split(size, -1) for x in rows), strict=True)]
    with torch.no_grad():
        sums = [network.tokens(part).sum(2, keepdim=True) for part in parts]
        mean = torch.stack(sums).sum(0) / rows.codes.shape[-1]
    return torch.cat([_shares(network, part, loss, mean) for part in parts])


def _shares(network: TabNSANetwork, rows: Encoded, loss: Loss, mean: Tensor) -> Tensor:
    with torch.enable_grad():
        tokens = network.tokens(rows).detach().requires_grad_()
        explained = loss.explained(network.answer(tokens))
        (gradient,) = torch.autograd.grad(explained.sum(), tokens)
    shares: Tensor = (gradient * (tokens.detach() - mean)).sum((0, 3))
    return shares.T
