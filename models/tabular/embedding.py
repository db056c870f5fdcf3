"""Tokens of a table: each column's number or category as a vector, for S networks at once."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hashtab.kernels import piecewise
from hashtab.kernels.core.library import apply
from hashtab.models.tabular.settings import SizedSettings
from hashtab.models.tabular.stacked import uniform
from hashtab.models.tabular.table import FIRST_CODE


class Encoded(NamedTuple):
    """Rows as a network reads them, columns first.

    Attributes:
        linear: `[S, Fn, B]` float32, scaled numbers.
        place: `[S, Fn, B]` float32, places among quantiles.
        missing: `[S, Fn, B]` bool.
        codes: `[S, Fc, B]` int64, of categories.
    """

    linear: Tensor
    place: Tensor
    missing: Tensor
    codes: Tensor

    def take(self, rows: Tensor) -> "Encoded":
        """Return rows `[S, B]` of a table `[1, F, N]` that all networks read, or of `[S, F, N]`."""
        if len(self.codes) == 1:
            return Encoded(*(part[0][:, rows].transpose(0, 1) for part in self))
        network = torch.arange(len(rows), device=rows.device)[:, None]
        return Encoded(*(part[network, :, rows].transpose(1, 2) for part in self))

    def keep(self, networks: Tensor) -> "Encoded":
        """Return what the given networks read, by index."""
        return self if len(self.codes) == 1 else Encoded(*(part[networks] for part in self))

    def some(self, count: int) -> "Encoded":
        """Return `count` rows of all parts of the table, always the same; all if there are fewer.

        They are drawn: the first would show one end of a sorted table, and evenly spaced ones one
        half of a table whose rows come in pairs.
        """
        rows = self.codes.shape[-1]
        if rows <= count:
            return self
        drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:count]
        return Encoded(*(part[..., drawn.to(part.device)] for part in self))


class NumericTokens(nn.Module):
    """Numbers as tokens: a linear part, a part for the place, and one for what is missing.

    Piecewise: the place's bins as in Gorishniy et al. (arXiv 2203.05556), their weights zero at
    first (TabM's version B). Periodic: cosines and sines of learned frequencies (same paper,
    equation 2).
    """

    def __init__(self, networks: int, columns: int, settings: SizedSettings) -> None:
        super().__init__()
        self.impl: piecewise.Impl = "auto"
        self.kind = settings.numeric
        features = {"piecewise": settings.bins, "periodic": 2 * settings.bins, "linear": 0}
        count = features[settings.numeric]
        weight = torch.zeros(networks, columns, count + 2, settings.width)
        bound = 1 / math.sqrt(settings.width)
        weight[:, :, count].uniform_(-bound, bound)
        if settings.numeric == "periodic":
            weight[:, :, :count].uniform_(-bound, bound)
            self.frequency = nn.Parameter(0.1 * torch.randn(networks, columns, 1, settings.bins))
        self.weight = nn.Parameter(weight)

    def forward(self, x: Encoded) -> Tensor:
        """Return tokens `[S, Fn, B, D]`."""
        if self.kind != "periodic":  # of no bins, a piecewise embedding is a linear one
            return piecewise.embed(x.linear, x.place, x.missing, self.weight, impl=self.impl)
        angle = 2 * math.pi * self.frequency * x.linear[..., None]
        features = [angle.cos(), angle.sin()]
        others = torch.stack([x.linear, x.missing.to(x.linear)], -1)
        others = others.expand(*angle.shape[:-1], 2)
        return torch.cat([*features, others], -1) @ self.weight


class _Lookup(torch.autograd.Function):
    """functional.embedding, whose own gradient takes four times as long for tables as small."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = table.shape
        return functional.embedding(rows, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        table = grads[0].new_zeros(ctx.shape)
        return table.index_put_((rows,), grads[0], accumulate=True), None


class CategoryTokens(nn.Module):
    """Categories as tokens; the slots of unseen and missing ones are zero until trained."""

    first: Tensor

    def __init__(self, networks: int, levels: tuple[int, ...], width: int) -> None:
        super().__init__()
        slots = [count + FIRST_CODE for count in levels]
        ends = torch.tensor(slots).cumsum(0)
        self.weight = uniform(networks, int(ends[-1]), width, fan_in=width)
        first = functional.pad(ends, (1, 0))[:-1]
        with torch.no_grad():
            for code in range(FIRST_CODE):
                self.weight[:, first + code] = 0
        self.register_buffer("first", first[:, None], persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Return tokens `[S, Fc, B, D]` of codes `[S, Fc, B]`, or of one `[1, Fc, B]` for all."""
        networks, slots, width = self.weight.shape
        network = torch.arange(networks, device=codes.device)[:, None, None] * slots
        rows, table = codes + self.first + network, self.weight.reshape(-1, width)
        if table.requires_grad:
            return apply(_Lookup, table, rows)
        return functional.embedding(rows, table)


class TableTokens(nn.Module):
    """All columns as tokens: numbers first, then categories; each with an identity of its own.

    Args:
        networks: S.
        numeric: number of columns of numbers.
        levels: number of categories of each categorical column.
        settings: of the network.
    """

    def __init__(
        self, networks: int, numeric: int, levels: tuple[int, ...], settings: SizedSettings
    ) -> None:
        super().__init__()
        self.count = numeric + len(levels)
        self.numbers = NumericTokens(networks, numeric, settings) if numeric else None
        self.categories = CategoryTokens(networks, levels, settings.width) if levels else None
        self.identity = uniform(networks, self.count, 1, settings.width, fan_in=settings.width)

    def forward(self, x: Encoded) -> Tensor:
        """Return tokens `[S, T, B, D]`."""
        tokens = [self.numbers(x)] if self.numbers is not None else []
        if self.categories is not None:
            tokens.append(self.categories(x.codes))
        return torch.cat(tokens, 1) + self.identity


class SharedTokens(nn.Module):
    """The published model's tokens: one linear layer for every number and every one-hot level.

    NOTE[DIFF]: code 0 (unseen) and 1 (missing) have a level of their own here as well.
    """

    def __init__(
        self, networks: int, numeric: int, levels: tuple[int, ...], settings: SizedSettings
    ) -> None:
        super().__init__()
        self.levels = [count + FIRST_CODE for count in levels]
        self.count = numeric + sum(self.levels)
        self.weight = uniform(networks, 1, 1, settings.width, fan_in=1)
        self.bias = uniform(networks, 1, 1, settings.width, fan_in=1)

    def forward(self, x: Encoded) -> Tensor:
        """Return tokens `[S, T, B, D]`."""
        one_hot = [
            functional.one_hot(x.codes[:, j], levels).mT.to(x.linear)
            for j, levels in enumerate(self.levels)
        ]
        scalars = torch.cat([x.linear, *one_hot], 1)
        return torch.addcmul(self.bias, scalars[..., None], self.weight)
