"""The TabNSA block: attention over columns beside a TabMixer, for S networks at once."""

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
            block=settings.block,
            stride=settings.block,
            select_block=settings.block,
            n_select=settings.selected,
            window=settings.window,
            causal=False,
            impl=self.impl,
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
