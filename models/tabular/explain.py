"""What drove a prediction: each column's share, by integrated gradients or by selection."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hashtab.models.tabular.embedding import Encoded
from hashtab.models.tabular.losses import Loss
from hashtab.models.tabular.network import TabNSANetwork

_STEPS = 8  # of the path; shares of default networks miss the difference by 3 % then


def mean_tokens(network: TabNSANetwork, rows: Encoded) -> Tensor:
    """Return the mean `[S, T, 1, D]` of each column's tokens over rows `[1, F, N]`."""
    with torch.no_grad():
        sums = [tokens.sum(2, keepdim=True) for tokens in _tokens(network, rows)]
        return torch.stack(sums).sum(0) / rows.codes.shape[-1]


def contributions(network: TabNSANetwork, rows: Encoded, baseline: Tensor, loss: Loss) -> Tensor:
    """Return `[N, T]`: what each token did to an output, on the way from a baseline to its own.

    Integrated gradients (arXiv 1703.01365) over tokens: a column whose token is the baseline's has
    driven nothing, and the shares of a row add up to what its output differs from that of the
    baseline, but for the path's steps. No row's shares depend on the other rows.

    Args:
        network: fitted networks; their answers are averaged.
        rows: `[1, F, N]`.
        baseline: tokens `[S, T, 1, D]` that rows are compared with; see `mean_tokens`.
        loss: says which output of a row is explained.
    """
    with torch.no_grad():
        parts = [_shares(network, part, baseline, loss) for part in _tokens(network, rows)]
        return torch.cat(parts)


def selections(network: TabNSANetwork, rows: Encoded) -> Tensor:
    """Return `[N, T]`: how often sparse attention selects each token; rows `[1, F, N]`."""
    with torch.no_grad():
        return torch.cat([network.selected(part) for part in _tokens(network, rows)])


def _tokens(network: TabNSANetwork, rows: Encoded) -> Iterator[Tensor]:
    """Yield tokens `[S, T, B, D]` of as many rows as fit at once."""
    parts = (part.split(network.rows_at_once(), -1) for part in rows)
    return (network.tokens(Encoded(*part)) for part in zip(*parts, strict=True))


def _shares(network: TabNSANetwork, tokens: Tensor, baseline: Tensor, loss: Loss) -> Tensor:
    output = loss.explained(network.answer(tokens))
    away, total = tokens - baseline, torch.zeros_like(tokens)
    for step in range(_STEPS):
        on_path = (baseline + (step + 0.5) / _STEPS * away).requires_grad_()
        with torch.enable_grad():
            answers = network.answer(on_path).mean((0, 1))
            (gradient,) = torch.autograd.grad((answers * output).sum(), on_path)
        total += gradient
    shares: Tensor = (total / _STEPS * away).sum((0, 3))
    return shares.T
