"""Native sparse attention's operators for torch.library: native code on CPUs, fake results."""

from typing import Any

import torch
from torch import Tensor

from hashtab.kernels.core import checks
from hashtab.kernels.core.library import register
from hashtab.kernels.core.precision import sums_dtype
from hashtab.kernels.nsa import native
from hashtab.kernels.nsa.blocks import Layout


def _attend(
    q: Tensor, keys: list[Tensor], gates: Tensor, lengths: Tensor | None, scale: float, *sizes: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = Layout(q.shape[1], *sizes)
    checks.check_lengths(lengths, layout.tokens)
    real = sums_dtype(keys[3].dtype)
    wide = [x.to(real) for x in keys]
    return native.attend(q.to(real), wide, gates.to(real), lengths, layout, scale)


def _attend_fake(
    q: Tensor, keys: list[Tensor], _gates: Tensor, _lengths: Any, _scale: float, *sizes: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real, layout = sums_dtype(keys[3].dtype), Layout(q.shape[1], *sizes)
    kv_heads, value_size = keys[3].shape[2:]
    out = q.new_empty((*q.shape[:3], value_size), dtype=real)
    chosen = (*q.shape[:2], kv_heads, layout.n_select)
    return (
        out,
        q.new_empty((3, *out.shape), dtype=real),
        q.new_empty((3, *q.shape[:3]), dtype=real),
        q.new_empty(chosen, dtype=torch.int64),
    )


def _attend_backward(
    grad: Tensor,
    branches: Tensor,
    log_sums: Tensor,
    chosen: Tensor,
    q: Tensor,
    keys: list[Tensor],
    gates: Tensor,
    lengths: Tensor | None,
    scale: float,
    *sizes: Any,
) -> list[Tensor]:
    layout = Layout(q.shape[1], *sizes)
    checks.check_lengths(lengths, layout.tokens)
    real = sums_dtype(keys[3].dtype)
    wide = [x.to(real) for x in keys]
    grads = native.attend_backward(
        grad.to(real),
        branches,
        log_sums,
        _checked(chosen, layout),
        q.to(real),
        wide,
        gates.to(real),
        lengths,
        layout,
        scale,
    )
    return list(grads)


def _checked(chosen: Tensor, layout: Layout) -> Tensor:
    """Refuse chosen blocks that do not exist, for they are addresses."""
    if chosen.numel() and not -1 <= int(chosen.min()) <= int(chosen.max()) < layout.n_choices:
        raise ValueError(f"chosen blocks must lie within -1 .. {layout.n_choices - 1}")
    return chosen


def _attend_backward_fake(
    _grad: Tensor,
    _branches: Tensor,
    _log_sums: Tensor,
    _chosen: Tensor,
    q: Tensor,
    keys: list[Tensor],
    gates: Tensor,
    *_: Any,
) -> list[Tensor]:
    real = sums_dtype(keys[3].dtype)
    return [x.new_empty(x.shape, dtype=real) for x in (q, *keys, gates)]


_INPUTS = "Tensor q, Tensor[] keys, Tensor gates, Tensor? lengths, float scale"
_SIZES = "int block, int stride, int select_block, int n_select, int window, bool causal"

register(
    "nsa_attend",
    f"({_INPUTS}, {_SIZES}) -> (Tensor, Tensor, Tensor, Tensor)",
    _attend,
    _attend_fake,
)
register(
    "nsa_attend_backward",
    f"(Tensor grad, Tensor branches, Tensor log_sums, Tensor chosen, {_INPUTS}, {_SIZES})"
    " -> Tensor[]",
    _attend_backward,
    _attend_backward_fake,
)
