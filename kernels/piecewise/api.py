"""Piecewise linear embeddings of numbers (Gorishniy et al., arXiv 2203.05556, section 3.2).

A column's K bins fill one after another: a number at place p has filled bin k (from 0) by
clamp(p - k, 0, 1). Its embedding is the sum of what each bin, filled so far, adds, of a linear part
and of one for what is missing: equation 1 and a linear layer, with the place said in one number.

`embed` takes `impl`: `"native"` (C on CPUs, for float32 and float64; sums of bins are made once a
column, so that a number costs the same with any number of bins, and a row has the same embedding
alone as among others), `"reference"` (the definition, on any device and in any floating dtype) or
`"auto"`, which is native code where it runs, and otherwise, and in `torch.export`, the definition.
A choice that cannot run raises RuntimeError with the reason.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hashtab.kernels.core import checks
from hashtab.kernels.core.dispatch import Impl, check_impl, native_builds, use_native_real
from hashtab.kernels.core.library import apply
from hashtab.kernels.piecewise import ops as _ops  # noqa: F401  registers torch.ops.hashtab.*
from hashtab.kernels.piecewise import reference
from hashtab.kernels.piecewise.native import SOURCE

_hashtab = torch.ops.hashtab
_native_builds = native_builds(SOURCE)


def embed(
    linear: Tensor, place: Tensor, missing: Tensor, weight: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Embed numbers of F columns for S networks.

    Args:
        linear: `[S, F, B]`, or `[1, F, B]` for all networks: scaled numbers.
        place: as `linear`, places among the bins, 0 .. K; beyond is as at the ends.
        missing: as `linear`, bool.
        weight: `[S, F, K + 2, D]`: what a full bin adds, K of them, the linear part's factor, and
            what is added where a number is missing.
        impl: which implementation; see the module. Native code has no gradient of the numbers:
            where one is asked for, `"auto"` is the definition.

    Returns:
        `[S, F, B, D]` in the dtype of `weight`.

    Raises:
        RuntimeError: `impl` cannot run.
        TypeError: a dtype is wrong.
        ValueError: shapes are wrong, or tensors lie on different devices.
    """
    check_impl(impl)
    _check(linear, place, missing, weight)
    numbers_learn = torch.is_grad_enabled() and (linear.requires_grad or place.requires_grad)
    if numbers_learn and impl == "native":
        raise RuntimeError("impl='native' cannot run: it has no gradient of linear and place")
    if not numbers_learn and use_native_real(impl, weight, SOURCE, _native_builds):
        return apply(_Embed, linear, place, missing, weight)
    with torch.autocast(weight.device.type, enabled=False):
        return reference.embed(linear, place, missing, weight)


def _check(linear: Tensor, place: Tensor, missing: Tensor, weight: Tensor) -> None:
    checks.check_rows("weight", weight, "[S, F, K + 2, D]")
    checks.check_rows("place", place, "[S, F, B]")
    if weight.shape[2] < 2:
        raise ValueError(
            "weight must be [S, F, K + 2, D] with K >= 0, so 2 at least in its third dimension, "
            f"got {tuple(weight.shape)}"
        )
    if place.shape[0] not in (1, weight.shape[0]) or place.shape[1] != weight.shape[1]:
        raise ValueError(
            f"place must be [S, F, B] or [1, F, B] for the weight of {tuple(weight.shape)}, got "
            f"{tuple(place.shape)}"
        )
    dtypes = {"linear": weight.dtype, "place": weight.dtype, "missing": torch.bool}
    for name, tensor in {"linear": linear, "place": place, "missing": missing}.items():
        if tensor.dtype != dtypes[name]:
            raise TypeError(f"{name} must be {dtypes[name]}, got {tensor.dtype}")
        if tensor.shape != place.shape:
            raise ValueError(
                f"{name} must be of the shape of place, {tuple(place.shape)}, got "
                f"{tuple(tensor.shape)}"
            )
    checks.check_same_device(linear=linear, place=place, missing=missing, weight=weight)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, linear: Tensor, place: Tensor, missing: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(linear, place, missing)
        ctx.bins = weight.shape[2] - 2
        embedded: Tensor = _hashtab.piecewise_embed(linear, place, missing, weight)
        return embedded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = _hashtab.piecewise_embed_backward(grads[0], *ctx.saved_tensors, ctx.bins)
        return None, None, None, grad
