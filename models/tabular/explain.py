"""What drove a prediction: each column's share of it, by gradient times input."""

import torch
from torch import Tensor

from hashtab.models.tabular.embedding import Encoded
from hashtab.models.tabular.network import TabNSANetwork


def contributions(network: TabNSANetwork, rows: Encoded, output: Tensor) -> Tensor:
    """Return `[N, T]`: the gradient of an output with respect to each token, times the token.

    A token's mean over the given rows is its baseline, so a column that is alike in all rows has
    driven nothing. To first order the shares of a row add up to what its output differs from that
    of the mean row.

    Args:
        network: fitted networks; their answers are averaged.
        rows: `[1, F, N]`.
        output: `[N]` int64, which output of each row is explained.
    """
    with torch.enable_grad():
        tokens = network.tokens(rows).detach().requires_grad_()
        answers = network.answer(tokens).mean((0, 1))
        chosen = answers.gather(1, output[:, None]) - _others(answers, output)
        (gradient,) = torch.autograd.grad(chosen.sum(), tokens)
    with torch.no_grad():
        centered = tokens - tokens.mean(2, keepdim=True)
        return (gradient * centered).sum((0, 3)).T


def _others(answers: Tensor, output: Tensor) -> Tensor:
    """Return the mean of each row's other outputs: logits mean something as differences only."""
    if answers.shape[1] == 1:
        return torch.zeros_like(answers)
    own = answers.gather(1, output[:, None])
    return (answers.sum(1, keepdim=True) - own) / (answers.shape[1] - 1)
