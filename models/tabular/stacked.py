"""Layers of several networks at once: S networks side by side, each with weights of its own.

Activations are `[S, T, R, D]`: network, column (token), row, feature. Columns come before rows, so
mixing over columns and mixing over features are both one batched matrix product without a copy.
"""

import math

import torch
from torch import Tensor, nn

from hashtab.kernels import tabmixer


def uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """Return a parameter drawn from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Linear(nn.Module):
    """S linear layers: `[S, R, inputs]` -> `[S, R, outputs]`."""

    def __init__(self, networks: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.impl: tabmixer.Impl = "auto"
        self.weight = uniform(networks, inputs, outputs, fan_in=inputs)
        self.bias = uniform(networks, 1, outputs, fan_in=inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply each network's layer to its rows."""
        return tabmixer.linear(x, self.weight, self.bias, impl=self.impl)


class ColumnLinear(nn.Module):
    """The weights of S linear layers over columns: `[S, T, R * D]` -> `[S, outputs, R * D]`."""

    def __init__(self, networks: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = uniform(networks, outputs, inputs, fan_in=inputs)
        self.bias = uniform(networks, outputs, 1, fan_in=inputs)


class LayerNorm(nn.Module):
    """S layer norms over the last dimension of `[S, T, R, D]`."""

    def __init__(self, networks: int, size: int) -> None:
        super().__init__()
        self.impl: tabmixer.Impl = "auto"
        self.weight = nn.Parameter(torch.ones(networks, 1, 1, size))
        self.bias = nn.Parameter(torch.zeros(networks, 1, 1, size))

    def forward(self, x: Tensor, by_row: bool = False) -> Tensor:
        """Normalise each token, and lay them out row by row, `[S, R, T, D]`, if asked to."""
        return tabmixer.layer_norm(x, self.weight, self.bias, by_row=by_row, impl=self.impl)


class Dropout(nn.Module):
    """Dropout by one random byte an element: a rate to 1 / 256, in a tenth of torch's time."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.threshold = round(rate * 256)

    def forward(self, x: Tensor) -> Tensor:
        """Zero elements at the rate in training, and scale the others up."""
        if not self.training or self.threshold == 0:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        drawn = words.random_(-(2**63), None).view(torch.uint8)[: x.numel()].view(x.shape)
        return x * ((drawn >= self.threshold) * (256 / (256 - self.threshold)))
