"""Calls into `native.c`: float32 or float64 tensors on the CPU."""

from pathlib import Path

import torch
from torch import Tensor

from hashtab.kernels.core import native

SOURCE = Path(__file__).with_name("native.c")
_TASKS = 16  # into which a backward pass is cut, whatever the number of threads


def tab_mixer(
    x: Tensor, weights: Tensor, seeds: Tensor | None, hidden: int, threshold: int
) -> Tensor:
    """Return the mixed tokens `[S, T, R, D]`; `weights` `[S, P]` are all of a network, in order."""
    out = x.new_empty(x.shape)
    tensors = [x, weights, _seeds(seeds), out]
    _call("tab_mixer", tensors, *x.shape, hidden, threshold)
    return out


def tab_mixer_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    seeds: Tensor | None,
    hidden: int,
    threshold: int,
    with_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x` and of `weights` (of no meaning without `with_weights`)."""
    grad_x = x.new_empty(x.shape)
    parts = _parts(x)
    grad_weights = weights.new_empty(len(weights), parts, weights.shape[1])
    tensors = [grad, x, weights, _seeds(seeds), grad_weights, grad_x]
    _call("tab_mixer_backward", tensors, *x.shape, hidden, threshold, int(with_weights), parts)
    return grad_x, grad_weights.sum(1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, by_row: bool) -> Tensor:
    """Return normalised tokens `[S, T, R, D]`, or `[S, R, T, D]` if `by_row`."""
    networks, tokens, rows, size = x.shape
    shape = (networks, rows, tokens, size) if by_row else x.shape
    out = x.new_empty(shape)
    _call("layer_norm", [x, weight, bias, out], *x.shape, int(by_row))
    return out


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, by_row: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x`, and of weight and bias `[S, 2, 1, 1, D]`."""
    grad_x = x.new_empty(x.shape)
    parts = _parts(x)
    grad_weights = x.new_empty(len(x), parts, 2, 1, 1, x.shape[3])
    _call(
        "layer_norm_backward", [grad, x, weight, grad_weights, grad_x], *x.shape, int(by_row), parts
    )
    return grad_x, grad_weights.sum(1)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `[S, R, O]` of rows `[S, R, I]`."""
    out = x.new_empty(*x.shape[:2], weight.shape[2])
    _call("linear", [x, weight, bias, out], *x.shape, weight.shape[2])
    return out


def _parts(x: Tensor) -> int:
    return max(1, min(-(-_TASKS // max(len(x), 1)), x.shape[2] // 16))


def _seeds(seeds: Tensor | None) -> Tensor:
    return torch.zeros(3, dtype=torch.int64) if seeds is None else seeds


def _call(function: str, tensors: list[Tensor], *sizes: int) -> None:
    native.call(SOURCE, f"{function}_{native.SUFFIX[tensors[-1].dtype]}", tensors, sizes)
