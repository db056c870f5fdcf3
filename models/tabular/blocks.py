"""The TabNSA block: attention over columns beside a TabMixer, for S networks at once."""

from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from hashtab.kernels import nsa, tabmixer
from hashtab.models.tabular.settings import SizedSettings
from hashtab.models.tabular.stacked import ColumnLinear, Dropout, LayerNorm, Linear


class TabMixer(nn.Module):
    """Mix columns and features, and join both by product (TabMixer, arXiv 2501.01557).

    y = LN(x); SiLU(LN(MLP over features of y * GELU(MLP over columns of y))), without the residual,
    and dropout of hidden units and of the result.
    """

    def __init__(self, networks: int, columns: int, settings: SizedSettings) -> None:
        super().__init__()
        width, hidden = settings.width, settings.mixer_width
        self.impl: tabmixer.Impl = "auto"
        self.dropout = settings.dropout
        self.norm = LayerNorm(networks, width)
        self.columns_in = ColumnLinear(networks, columns, hidden)
        self.columns_out = ColumnLinear(networks, hidden, columns)
        self.features_in = Linear(networks, width, hidden)
        self.features_out = Linear(networks, hidden, width)
        self.out_norm = LayerNorm(networks, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[S, T, R, D]` to the same shape."""
        dropout = self.dropout if self.training else 0.0
        weights = tabmixer.Weights(*self.parameters())  # made in this order
        return tabmixer.tab_mixer(x, weights, dropout=dropout, impl=self.impl)


class _Layout(TypedDict):
    """Which blocks sparse attention selects from, as arguments of `nsa`'s functions."""

    block: int
    stride: int
    select_block: int
    n_select: int
    causal: bool


class ColumnAttention(nn.Module):
    """Attention of each column to the others, in both directions: over all or sparse, and dropout.

    Sparse is native sparse attention (arXiv 2502.11089) with blocks of neighbouring columns
    compressed to their mean; `order` `[T]` says which columns are neighbours.
    """

    order: Tensor

    def __init__(self, networks: int, columns: int, settings: SizedSettings) -> None:
        super().__init__()
        self.settings = settings
        self.impl: nsa.Impl = "auto"
        self.norm = LayerNorm(networks, settings.width)
        self.projections = Linear(networks, settings.width, 3 * settings.width)
        self.sparse = settings.attention == "sparse"
        self.register_buffer("order", torch.arange(columns))
        if self.sparse:
            self.gates = Linear(networks, settings.width, 3 * settings.heads)
        self.out = Linear(networks, settings.width, settings.width)
        self.dropout = Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[S, T, R, D]` to the same shape."""
        if self.sparse:
            return self._attend(x[:, self.order])[:, self.order.argsort()]
        return self._attend(x)

    def _attend(self, x: Tensor) -> Tensor:
        networks, columns, rows, width = x.shape
        tokens = self.norm(x).flatten(1, 2)
        q, k, v = self._by_row(self.projections(tokens), x.shape).chunk(3, 2)
        mixed = self._sparse(q, k, v, tokens, x.shape) if self.sparse else _dense(q, k, v)
        mixed = mixed.reshape(networks, rows, columns, width).transpose(1, 2)
        out: Tensor = self.dropout(self.out(mixed.flatten(1, 2)))
        return out.view(x.shape)

    def selected(self, x: Tensor) -> Tensor:
        """Return `[S, R, T]`: the share of other blocks' columns that select each one's block.

        Of sparse attention to tokens `[S, T, R, D]`, as `forward` takes them; heads count alike.
        """
        networks, columns, rows, _ = x.shape
        x = x[:, self.order]
        q, k, _ = self._by_row(self.projections(self.norm(x).flatten(1, 2)), x.shape).chunk(3, 2)
        chosen = nsa.selected_blocks(q, k, **self._layout(), impl=self.impl)
        # A column's first choice is its own block.
        others = chosen[..., 1:].flatten(1) + 1
        count = -(-columns // self.settings.block)
        times = torch.zeros(len(others), count + 1, device=x.device)
        times.scatter_add_(1, others, torch.ones((), device=x.device).expand(others.shape))
        block_of = torch.arange(columns, device=x.device) // self.settings.block
        outside = columns - block_of.bincount(minlength=count)
        shares = times[:, 1:] / (outside * self.settings.heads)
        by_column = shares[:, block_of][:, self.order.argsort()]
        return by_column.view(networks, rows, columns)

    def _by_row(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """Return `[S, T * R, n * H * E]` as sequences of columns `[S * R, T, n * H, E]`."""
        networks, columns, rows, width = shape
        head = width // self.settings.heads
        heads = tokens.shape[-1] // head
        parts = tokens.view(networks, columns, rows, heads, head).transpose(1, 2)
        return parts.reshape(networks * rows, columns, heads, head)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, shape: torch.Size) -> Tensor:
        networks, columns, rows, _ = shape
        settings, heads = self.settings, self.settings.heads
        gates = self.gates(tokens).sigmoid().view(networks, columns, rows, heads, 3)
        return nsa.native_sparse_attention(
            q,
            k,
            v,
            gates=gates.transpose(1, 2).reshape(networks * rows, columns, heads, 3),
            **self._layout(),
            window=settings.window,
            impl=self.impl,
        )

    def _layout(self) -> _Layout:
        block = self.settings.block
        return _Layout(
            block=block,
            stride=block,
            select_block=block,
            n_select=self.settings.selected,
            causal=False,
        )


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class TabNSABlock(nn.Module):
    """x + fusion(attention(x), TabMixer(x)) (TabNSA, arXiv 2503.09850).

    NOTE[DIFF]: the published block has no residual around attention; here there is one for both.
    """

    def __init__(self, networks: int, columns: int, settings: SizedSettings) -> None:
        super().__init__()
        branches: list[nn.Module] = []
        if settings.attention not in ("none", "auto"):
            branches.append(ColumnAttention(networks, columns, settings))
        if settings.mixer:
            branches.append(TabMixer(networks, columns, settings))
        self.branches = nn.ModuleList(branches)
        self.gate = None
        if settings.fusion == "gate":
            # Zero opens both branches halfway, twice over: the block begins as the sum.
            self.gate = nn.Parameter(torch.zeros(networks, len(branches), 1, 1, settings.width))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[S, T, R, D]` to the same shape."""
        total = x
        for i, branch in enumerate(self.branches):
            y = branch(x)
            total = total + (y if self.gate is None else 2 * self.gate[:, i].sigmoid() * y)
        return total
