"""The TabMixer's operators for torch.library: native code on CPUs, fake results."""

from typing import Any

from torch import Tensor

from hashtab.kernels.core.library import register
from hashtab.kernels.tabmixer import native


def _mixer_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _mixer_backward_fake(
    _grad: Tensor, x: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _norm_fake(x: Tensor, _weight: Tensor, _bias: Tensor, by_row: bool) -> Tensor:
    networks, tokens, rows, size = x.shape
    return x.new_empty((networks, rows, tokens, size) if by_row else x.shape)


def _norm_backward_fake(_grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(len(x), 2, 1, 1, x.shape[3])


def _linear_fake(x: Tensor, weight: Tensor, _bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[2])


_INPUTS = "Tensor x, Tensor weights, Tensor? seeds, int hidden, int threshold"

register("tab_mixer", f"({_INPUTS}) -> Tensor", native.tab_mixer, _mixer_fake)
register(
    "tab_mixer_backward",
    f"(Tensor grad, {_INPUTS}, bool with_weights) -> (Tensor, Tensor)",
    native.tab_mixer_backward,
    _mixer_backward_fake,
)
register(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, bool by_row) -> Tensor",
    native.layer_norm,
    _norm_fake,
)
register(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool by_row) -> (Tensor, Tensor)",
    native.layer_norm_backward,
    _norm_backward_fake,
)
register(
    "stacked_linear",
    "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    native.linear,
    _linear_fake,
)
