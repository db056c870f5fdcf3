"""Calls into `native.c`: the operator and its backward, CPU tensors only."""

from pathlib import Path

import torch
from torch import Tensor

from hashtab.kernels.core import native
from hashtab.kernels.nsa.blocks import Layout

SOURCE = Path(__file__).with_name("native.c")
_SUFFIX = {torch.float32: "float", torch.float64: "double"}


def attend(
    q: Tensor,
    keys: list[Tensor],
    gates: Tensor,
    lengths: Tensor | None,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result and what the backward pass needs; all floats are of one dtype.

    Args:
        q: `[B, T, H, D]`.
        keys: keys and values of the compression, selection and window branch, in that order.
        gates: `[B, T, H, 3]`.
        lengths: `[B]` int64; None for no padding.
        layout: what is seen.
        scale: factor of the scores.

    Returns:
        The gated sum `[B, T, H, Dv]`, the branches `[3, B, T, H, Dv]`, the log-sum-exp of their
        scores `[3, B, T, H]` and the chosen blocks `[B, T, Hkv, n_select]` int64, -1 for none.
    """
    batch, tokens, heads, _ = q.shape
    kv_heads, value_size = keys[3].shape[2:]
    out = q.new_zeros(batch, tokens, heads, value_size)
    branches = q.new_zeros(3, *out.shape)
    log_sums = q.new_zeros(3, batch, tokens, heads)
    chosen = lengths_of(q, lengths).new_full((batch, tokens, kv_heads, layout.n_select), -1)
    tensors = [*_inputs(q, keys, gates, lengths, scale), branches, log_sums, chosen, out]
    sizes = _sizes(q, keys, layout)
    native.call(SOURCE, f"nsa_attend_{_SUFFIX[q.dtype]}", tensors, sizes)
    return out, branches, log_sums, chosen


def attend_backward(
    grad: Tensor,
    branches: Tensor,
    log_sums: Tensor,
    chosen: Tensor,
    q: Tensor,
    keys: list[Tensor],
    gates: Tensor,
    lengths: Tensor | None,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, of the six keys and values, and of the gates."""
    grad_q = q.new_zeros(q.shape)
    grad_keys = [q.new_empty(x.shape) for x in keys]
    grad_gates = q.new_zeros(gates.shape)
    inputs = [grad, branches, log_sums, chosen, *_inputs(q, keys, gates, lengths, scale)]
    tensors = [*inputs, *grad_keys, grad_gates, grad_q]
    function = f"nsa_attend_backward_{_SUFFIX[q.dtype]}"
    native.call(SOURCE, function, tensors, _sizes(q, keys, layout))
    return grad_q, *grad_keys, grad_gates


def lengths_of(q: Tensor, lengths: Tensor | None) -> Tensor:
    """Return `lengths`, or those of whole sequences."""
    whole = torch.full(q.shape[:1], q.shape[1], dtype=torch.int64)
    return whole if lengths is None else lengths


def _inputs(
    q: Tensor, keys: list[Tensor], gates: Tensor, lengths: Tensor | None, scale: float
) -> list[Tensor]:
    return [q, *keys, gates, lengths_of(q, lengths), q.new_tensor(scale)]


def _sizes(q: Tensor, keys: list[Tensor], layout: Layout) -> list[int]:
    batch, tokens, heads, size = q.shape
    kv_heads, value_size = keys[3].shape[2:]
    shape = [batch, tokens, kv_heads, heads // kv_heads, size, value_size, layout.n_blocks]
    seen = (layout.block, layout.stride, layout.select_block, layout.n_select, layout.window)
    return [*shape, *seen, int(layout.causal)]
