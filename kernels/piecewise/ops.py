"""The operators for torch.library: native code on CPUs, fake results."""

from torch import Tensor

from hashtab.kernels.core.library import register
from hashtab.kernels.piecewise import native


def _fake(_linear: Tensor, place: Tensor, _missing: Tensor, weight: Tensor) -> Tensor:
    networks, columns, _, size = weight.shape
    return weight.new_empty(networks, columns, place.shape[2], size)


def _backward_fake(
    grad: Tensor, _linear: Tensor, _place: Tensor, _missing: Tensor, bins: int
) -> Tensor:
    networks, columns, _, size = grad.shape
    return grad.new_empty(networks, columns, bins + 2, size)


register(
    "piecewise_embed",
    "(Tensor linear, Tensor place, Tensor missing, Tensor weight) -> Tensor",
    native.embed,
    _fake,
)
register(
    "piecewise_embed_backward",
    "(Tensor grad, Tensor linear, Tensor place, Tensor missing, int bins) -> Tensor",
    native.embed_backward,
    _backward_fake,
)
