"""Native sparse attention (arXiv 2502.11089) as a layer."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hashtab.kernels import nsa
from hashtab.kernels.core import Impl

Compression = Literal["mean", "mlp"]


class NativeSparseAttention(nn.Module):
    """Attention of each token to compressed blocks, to a few selected blocks and to a window.

    Args:
        dim: size of a token.
        heads: query heads H.
        kv_heads: heads of keys and values, dividing `heads`; as many as `heads` when None.
        head_dim: size of a head; dim / heads when None.
        block: tokens of a compression block.
        stride: distance between beginnings of compression blocks, 1 .. block; `block` when None.
        select_block: tokens of a selection block; `block` when None.
        n_select: selection blocks of a token, its own included.
        window: tokens that a token sees at most on each side, itself included.
        causal: whether later tokens are hidden.
        compression: `"mean"` of a block's keys and values, or `"mlp"`: to the mean a learned
            function of the block is added, which is zero at first.
        separate: whether each branch has keys and values of its own, as in the paper, or all one.

    Raises:
        ValueError: a setting is out of its range or does not fit another.

    >>> NativeSparseAttention(32, heads=4, kv_heads=2)(torch.zeros(2, 50, 32)).shape
    torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        block: int = 16,
        stride: int | None = None,
        select_block: int | None = None,
        n_select: int = 2,
        window: int = 16,
        causal: bool = False,
        compression: Compression = "mean",
        separate: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        self.block, self.stride = block, block if stride is None else stride
        self.select_block = block if select_block is None else select_block
        self.n_select, self.window, self.causal = n_select, window, causal
        self.branches = 3 if separate else 1
        self._check(dim, head_dim, compression)
        self.head_dim = dim // heads if head_dim is None else head_dim
        kv_size = 2 * self.branches * self.kv_heads * self.head_dim
        self.queries = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.keys_values = nn.Linear(dim, kv_size, bias=False)
        self.gates = nn.Linear(dim, heads * 3)
        self.output = nn.Linear(heads * self.head_dim, dim, bias=False)
        # Every branch has the same say at first, whatever the token.
        nn.init.zeros_(self.gates.weight)
        nn.init.zeros_(self.gates.bias)
        learned = compression == "mlp"
        self.compress_k = BlockCompression(self.head_dim, block, self.stride) if learned else None
        self.compress_v = BlockCompression(self.head_dim, block, self.stride) if learned else None

    def forward(self, x: Tensor, lengths: Tensor | None = None, impl: Impl = "auto") -> Tensor:
        """Mix the tokens.

        Args:
            x: `[..., T, dim]`.
            lengths: int64 of the leading dimensions of `x`, tokens that are no padding; None for
                all. Padding comes out as zeros.
            impl: `"auto"`, `"native"` or `"reference"`; see `hashtab.kernels.nsa`.

        Returns:
            `[..., T, dim]`.
        """
        tokens = x.reshape(-1, *x.shape[-2:])
        lengths = None if lengths is None else lengths.reshape(-1)
        q, keys, values = self._project(tokens)
        mixed = nsa.native_sparse_attention(
            q,
            (keys[-2], keys[-1]),
            (values[-2], values[-1]),
            gates=self.gates(tokens).unflatten(-1, (self.heads, 3)).sigmoid(),
            block=self.block,
            stride=self.stride,
            select_block=self.select_block,
            n_select=self.n_select,
            window=self.window,
            causal=self.causal,
            lengths=lengths,
            k_compressed=self._compress(keys[0], self.compress_k, lengths),
            v_compressed=self._compress(values[0], self.compress_v, lengths),
            impl=impl,
        )
        out: Tensor = self.output(mixed.flatten(-2))
        return out.view(x.shape)

    @torch.no_grad()
    def selected_blocks(
        self, x: Tensor, lengths: Tensor | None = None, impl: Impl = "auto"
    ) -> Tensor:
        """Return which blocks of `select_block` tokens each token selects.

        Args:
            x: `[..., T, dim]`.
            lengths: int64 of the leading dimensions of `x`; None for no padding.
            impl: which implementation.

        Returns:
            `[..., T, kv_heads, n_select]` int64, the token's own block first; -1 for none.
        """
        tokens = x.reshape(-1, *x.shape[-2:])
        lengths = None if lengths is None else lengths.reshape(-1)
        q, keys, _ = self._project(tokens)
        chosen = nsa.selected_blocks(
            q,
            keys[-2],
            block=self.block,
            stride=self.stride,
            select_block=self.select_block,
            n_select=self.n_select,
            causal=self.causal,
            lengths=lengths,
            k_compressed=self._compress(keys[0], self.compress_k, lengths),
            impl=impl,
        )
        return chosen.view(*x.shape[:-1], self.kv_heads, self.n_select)

    def _project(self, tokens: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return queries, and keys and values of compression, selection and window, or of all."""
        q = self.queries(tokens).unflatten(-1, (self.heads, self.head_dim))
        shape = (2, self.branches, self.kv_heads, self.head_dim)
        keys, values = self.keys_values(tokens).unflatten(-1, shape).unbind(2)
        keys, values = list(keys.unbind(2)), list(values.unbind(2))
        if self.branches == 1:
            return q, keys * 2, values * 2
        return q, keys, values

    def _compress(
        self, x: Tensor, learned: "BlockCompression | None", lengths: Tensor | None
    ) -> Tensor:
        mean = nsa.compress_mean(x, self.block, self.stride, lengths)
        return mean if learned is None else mean + learned(x, lengths)

    def _check(self, dim: int, head_dim: int | None, compression: str) -> None:
        if compression not in get_args(Compression):
            raise ValueError(
                f"compression must be one of {get_args(Compression)}, got {compression=}"
            )
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim=}")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim=}")
        for name in ("heads", "kv_heads", "block", "select_block", "n_select", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {name}={getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide heads, got kv_heads={self.kv_heads}, heads={self.heads}"
            )
        if not 1 <= self.stride <= self.block:
            raise ValueError(
                f"stride must lie within 1 .. block, got stride={self.stride}, block={self.block}"
            )
        if head_dim is None and dim % self.heads:
            raise ValueError(
                f"heads must divide dim where head_dim is None, got heads={self.heads}, {dim=}"
            )


class BlockCompression(nn.Module):
    """A learned function of a block's rows and their places, zero at first (phi of eq. 7).

    NOTE[DIFF]: the paper's function stands alone; here its result is added to the block's mean, so
    that selection means something from the first step.

    Args:
        size: of a row and of the result, D.
        block: rows of a block.
        stride: distance between beginnings of blocks.
    """

    def __init__(self, size: int, block: int, stride: int) -> None:
        super().__init__()
        self.block, self.stride = block, stride
        self.places = nn.Parameter(torch.randn(block, 1, size) * 0.02)
        self.hidden = nn.Linear(block * size, 2 * size)
        self.out = nn.Linear(2 * size, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return `[B, N, heads, D]` of `[B, T, heads, D]`; padding and rows past T are zeros."""
        members = nsa.block_members(x, self.block, self.stride)
        end = x.shape[1] if lengths is None else lengths[:, None, None]
        begin = torch.arange(members.shape[1], device=x.device) * self.stride
        position = begin[:, None] + torch.arange(self.block, device=x.device)
        valid = (position < end).view(-1, *members.shape[1:3], 1, 1)
        rows = (members + self.places).masked_fill(~valid, 0).transpose(2, 3).flatten(3)
        out: Tensor = self.out(torch.nn.functional.gelu(self.hidden(rows)))
        return out
