"""What drove a prediction: each column's share of it, by integrated gradients."""

import torch
from torch import Tensor

from hashtab.models.tabular.embedding import Encoded
from hashtab.models.tabular.losses import Loss
from hashtab.models.tabular.network import TabNSANetwork

_STEPS = 8  # of the path; shares of default networks miss the difference by 3 % then


def contributions(network: TabNSANetwork, rows: Encoded, loss: Loss) -> Tensor:
    """Return `[N, T]`: what each token did to an output, on the way from the mean row to its own.

    Integrated gradients (arXiv 1703.01365) over tokens, from their mean over the given rows: a
    column that is alike in all rows has driven nothing, and the shares of a row add up to what its
    output differs from that of the mean row, but for the path's steps.

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
        return torch.cat([_shares(network, network.tokens(part), loss, mean) for part in parts])


def _shares(network: TabNSANetwork, tokens: Tensor, loss: Loss, mean: Tensor) -> Tensor:
    output = loss.explained(network.answer(tokens))
    away, total = tokens - mean, torch.zeros_like(tokens)
    for step in range(_STEPS):
        on_path = (mean + (step + 0.5) / _STEPS * away).requires_grad_()
        with torch.enable_grad():
            answers = network.answer(on_path).mean((0, 1))
            (gradient,) = torch.autograd.grad((answers * output).sum(), on_path)
        total += gradient
    shares: Tensor = (total / _STEPS * away).sum((0, 3))
    return shares.T
