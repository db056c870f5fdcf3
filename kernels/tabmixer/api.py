"""The TabMixer (arXiv 2501.01557) of S networks side by side, the public functions.

y = LN(x); dropout(SiLU(LN(MLP over features of y * GELU(MLP over columns of y)))), without the
residual; the MLPs are dropout(ReLU(.)) between two linear layers. LN normalises a token, its weight
and bias are a network's own.

Functions take `impl`: `"native"` (C on CPUs, for float32 and float64; a few rows go through all of
it while they lie in the cache, and the backward pass computes the forward pass again, so that
nothing of it is kept), `"reference"` (the definition, on any device and in any floating dtype) or
`"auto"`, which is native code where it runs, and otherwise, and in `torch.export`, the definition.
A choice that cannot run raises RuntimeError with the reason. Both drop the same numbers.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hashtab.kernels.core import checks
from hashtab.kernels.core.dispatch import Impl, check_impl, native_builds, use_native_real
from hashtab.kernels.core.library import apply
from hashtab.kernels.tabmixer import ops as _ops  # noqa: F401  registers torch.ops.hashtab.*
from hashtab.kernels.tabmixer import reference
from hashtab.kernels.tabmixer.native import SOURCE

_hashtab = torch.ops.hashtab
_native_builds = native_builds(SOURCE)


class Weights(NamedTuple):
    """Weights of S TabMixers over T columns of D features, with H hidden units.

    Attributes:
        norm_weight: `[S, 1, 1, D]`.
        norm_bias: `[S, 1, 1, D]`.
        columns_in: `[S, H, T]`, from columns to hidden units.
        columns_in_bias: `[S, H, 1]`.
        columns_out: `[S, T, H]`.
        columns_out_bias: `[S, T, 1]`.
        features_in: `[S, D, H]`, from features to hidden units.
        features_in_bias: `[S, 1, H]`.
        features_out: `[S, H, D]`.
        features_out_bias: `[S, 1, D]`.
        out_weight: `[S, 1, 1, D]`, of the layer norm of the product.
        out_bias: `[S, 1, 1, D]`.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    columns_in: Tensor
    columns_in_bias: Tensor
    columns_out: Tensor
    columns_out_bias: Tensor
    features_in: Tensor
    features_in_bias: Tensor
    features_out: Tensor
    features_out_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def tab_mixer(
    x: Tensor,
    weights: Weights,
    *,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Mix columns and features of tokens, and join both by product.

    Args:
        x: `[S, T, R, D]`, tokens: network, column, row, feature.
        weights: of the networks.
        dropout: share of hidden units and results that are dropped, to 1 / 256.
        seeds: `[3]` int64 on the CPU, of what is dropped: of hidden units of columns, of those of
            features, of results. Drawn from torch's generator when None.
        impl: which implementation; see the module.

    Returns:
        `[S, T, R, D]` in the dtype of `x`.

    Raises:
        RuntimeError: `impl` cannot run.
        TypeError: a dtype is wrong.
        ValueError: shapes or the rate are wrong.
    """
    check_impl(impl)
    checks.check_rows("x", x, "[S, T, R, D]")
    _check_weights(x, weights)
    threshold = _threshold(dropout)
    if threshold == 0:
        seeds = None
    elif seeds is None:
        seeds = torch.empty(3, dtype=torch.int64).random_(-(2**63), None)
    elif seeds.shape != (3,) or seeds.dtype != torch.int64 or seeds.device.type != "cpu":
        found = f"{tuple(seeds.shape)} {seeds.dtype} on {seeds.device}"
        raise ValueError(f"seeds must be [3] int64 on the CPU, got {found}")
    if use_native_real(impl, x, SOURCE, _native_builds):
        return apply(_TabMixer, x, seeds, threshold, *weights)
    with torch.autocast(x.device.type, enabled=False):
        return reference.tab_mixer(x, list(weights), seeds, threshold)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, by_row: bool = False, impl: Impl = "auto"
) -> Tensor:
    """Normalise tokens, each network with a weight and a bias of its own.

    Args:
        x: `[S, T, R, D]`, tokens.
        weight: `[S, 1, 1, D]`.
        bias: `[S, 1, 1, D]`.
        by_row: whether the result is laid out row by row.
        impl: which implementation; see the module.

    Returns:
        `[S, T, R, D]`, or `[S, R, T, D]` if `by_row`, in the dtype of `x`.

    Raises:
        RuntimeError: `impl` cannot run.
        TypeError: a dtype is wrong.
        ValueError: shapes are wrong.
    """
    check_impl(impl)
    checks.check_rows("x", x, "[S, T, R, D]")
    shape = (x.shape[0], 1, 1, x.shape[3])
    _check_alike("weight", weight, x, shape)
    _check_alike("bias", bias, x, shape)
    if use_native_real(impl, x, SOURCE, _native_builds):
        return apply(_LayerNorm, x, weight, bias, by_row)
    with torch.autocast(x.device.type, enabled=False):
        y = reference.layer_norm(x, weight, bias)
        return y.transpose(1, 2) if by_row else y


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Apply linear layers, each network's to its rows.

    Native code sums in the order of the inputs, so that a row has the same result alone as among
    others, which products of libraries do not promise. It has no gradient: where one is asked for,
    `"auto"` is the definition.

    Args:
        x: `[S, R, I]`, rows.
        weight: `[S, I, O]`.
        bias: `[S, 1, O]`.
        impl: which implementation; see the module.

    Returns:
        `[S, R, O]` in the dtype of `x`.

    Raises:
        RuntimeError: `impl` cannot run.
        TypeError: a dtype is wrong.
        ValueError: shapes are wrong.
    """
    check_impl(impl)
    checks.check_rows("x", x, "[S, R, I]")
    outputs = weight.shape[-1]
    _check_alike("weight", weight, x, (len(x), x.shape[2], outputs))
    _check_alike("bias", bias, x, (len(x), 1, outputs))
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    if learns and impl == "native":
        raise RuntimeError("impl='native' cannot run: it has no gradient")
    if not learns and use_native_real(impl, x, SOURCE, _native_builds):
        summed: Tensor = _hashtab.stacked_linear(x, weight, bias)
        return summed
    with torch.autocast(x.device.type, enabled=False):
        return torch.baddbmm(bias, x, weight)


def _threshold(dropout: float) -> int:
    """Return the number of bytes of 256 that drop."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout=}")
    return min(round(dropout * 256), 255)


def _check_weights(x: Tensor, weights: Weights) -> None:
    networks, tokens, _, size = x.shape
    hidden = weights.columns_in.shape[1] if weights.columns_in.dim() == 3 else 1
    one = (networks, 1, 1, size)
    shapes: list[tuple[int, ...]] = [
        *(one, one),
        *((networks, hidden, tokens), (networks, hidden, 1)),
        *((networks, tokens, hidden), (networks, tokens, 1)),
        *((networks, size, hidden), (networks, 1, hidden)),
        *((networks, hidden, size), (networks, 1, size)),
        *(one, one),
    ]
    for name, weight, shape in zip(Weights._fields, weights, shapes, strict=True):
        _check_alike(name, weight, x, shape)


def _check_alike(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {shape} for this x, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


class _TabMixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seeds: Tensor | None, threshold: int, *weights: Tensor
    ) -> Tensor:
        flat = torch.cat([weight.flatten(1) for weight in weights], 1)
        ctx.save_for_backward(x, flat, seeds)
        ctx.settings = weights[2].shape[1], threshold
        ctx.shapes = [weight.shape for weight in weights]
        mixed: Tensor = _hashtab.tab_mixer(x, flat, seeds, *ctx.settings)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with_weights = any(ctx.needs_input_grad[3:])
        grad_x, flat = _hashtab.tab_mixer_backward(
            grads[0], *ctx.saved_tensors, *ctx.settings, with_weights
        )
        if not with_weights:
            return grad_x, *[None] * 14
        parts = flat.split([shape[1:].numel() for shape in ctx.shapes], 1)
        found = (part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
        return grad_x, None, None, *found


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, by_row: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by_row = by_row
        normalised: Tensor = _hashtab.layer_norm(x, weight, bias, by_row)
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weights = _hashtab.layer_norm_backward(
            grads[0], *ctx.saved_tensors, ctx.by_row
        )
        return grad_x, *grad_weights.unbind(1), None
