"""The TabNSA network: tokens of columns, blocks of attention beside a TabMixer, a readout."""

import torch
from torch import Tensor, nn

from hashtab.kernels import tabmixer
from hashtab.models.tabular.blocks import ColumnAttention, TabNSABlock
from hashtab.models.tabular.embedding import Encoded, SharedTokens, TableTokens
from hashtab.models.tabular.order import correlation_order
from hashtab.models.tabular.settings import SizedSettings
from hashtab.models.tabular.stacked import Dropout, LayerNorm, Linear, uniform

_ELEMENTS = 2**24  # of tokens at once where no gradient is kept: 64 MB
_ROWS = 1024  # more at once are no faster


class TabNSANetwork(nn.Module):
    """S networks of M BatchEnsemble members each, over one table's columns.

    Args:
        networks: S; every parameter is `[S, ...]`, so networks are trained side by side and share
            nothing.
        numeric: number of columns of numbers, Fn.
        levels: number of categories of each categorical column.
        outputs: numbers that the network answers with, O.
        settings: of the network.
    """

    def __init__(
        self,
        networks: int,
        numeric: int,
        levels: tuple[int, ...],
        outputs: int,
        settings: SizedSettings,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.members = settings.members
        tokens = TableTokens if settings.columns == "own" else SharedTokens
        self.tokens = tokens(networks, numeric, levels, settings)
        columns, width = self.tokens.count, settings.width
        self.features = columns * width * settings.members
        if settings.members > 1:
            signs = torch.randint(2, (networks, columns, settings.members, 1, width)) * 2.0 - 1
            self.adapter = nn.Parameter(signs)
        blocks = (TabNSABlock(networks, columns, settings) for _ in range(settings.blocks))
        self.blocks = nn.Sequential(*blocks)
        self.readout = Readout(networks, columns, settings)
        hidden = settings.readout_width
        self.head = uniform(networks, self.members, hidden, outputs, fan_in=hidden)
        self.head_bias = nn.Parameter(torch.zeros(networks, self.members, 1, outputs))

    def order_columns(self, rows: Encoded) -> None:
        """Make neighbours of columns that correlate in `rows` `[1, F, N]`, for sparse attention."""
        for module in self.modules():
            if isinstance(module, ColumnAttention) and module.sparse:
                module.order.copy_(correlation_order(rows))

    def forward(self, x: Encoded) -> Tensor:
        """Answer for rows `[S, F, B]`, or `[1, F, B]` for all networks alike: `[S, M, B, O]`."""
        return self.answer(self.tokens(x))

    def rows_at_once(self) -> int:
        """Return how many rows fit at once, so that memory does not grow with rows or columns."""
        return max(1, min(_ROWS, _ELEMENTS // (self.features * len(self.head))))

    def answer(self, tokens: Tensor) -> Tensor:
        """Answer for tokens `[S, T, B, D]`: `[S, M, B, O]`."""
        hidden: Tensor = self.readout(self.blocks(self._by_member(tokens)))
        hidden = hidden.unflatten(1, (self.members, -1))
        parts = (part.flatten(0, 1) for part in (hidden, self.head, self.head_bias))
        answers: Tensor = tabmixer.linear(*parts, impl=self.readout.linear.impl)
        return answers.view(*hidden.shape[:3], self.head.shape[-1])

    def selected(self, tokens: Tensor) -> Tensor:
        """Return how often tokens `[S, T, B, D]` are selected, as a share `[B, T]`.

        See `ColumnAttention.selected`; averaged over blocks of the network, networks and members.
        """
        x, shares = self._by_member(tokens), []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, TabNSABlock)
            shares += [b.selected(x) for b in block.branches if isinstance(b, ColumnAttention)]
            if i + 1 < len(self.blocks):
                x = block(x)
        by_member: Tensor = torch.stack(shares).unflatten(2, (self.members, -1))
        return by_member.mean((0, 1, 2))

    def _by_member(self, tokens: Tensor) -> Tensor:
        """Return the tokens of all members, `[S, T, M * B, D]`."""
        if self.members == 1:
            return tokens
        return (tokens[:, :, None] * self.adapter).flatten(2, 3)


class Readout(nn.Module):
    """A hidden layer over all tokens, or over their mean: `[S, T, R, D]` -> `[S, R, width]`."""

    def __init__(self, networks: int, columns: int, settings: SizedSettings) -> None:
        super().__init__()
        self.flattens = settings.flattens(columns)
        inputs = settings.width * (columns if self.flattens else 1)
        self.norm = LayerNorm(networks, settings.width)
        self.linear = Linear(networks, inputs, settings.readout_width)
        self.dropout = Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Read the tokens."""
        x = self.norm(x, by_row=self.flattens)
        x = x.flatten(2) if self.flattens else x.mean(1)
        hidden: Tensor = self.dropout(self.linear(x).relu())
        return hidden
