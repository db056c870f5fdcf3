"""Calls into `native.c`: float32 or float64 tensors on the CPU."""

from pathlib import Path

from torch import Tensor

from hashtab.kernels.core import native

SOURCE = Path(__file__).with_name("native.c")


def embed(linear: Tensor, place: Tensor, missing: Tensor, weight: Tensor) -> Tensor:
    """Return embeddings `[S, F, B, D]` of numbers `[S or 1, F, B]`."""
    networks, columns, features, size = weight.shape
    out = weight.new_empty(networks, columns, place.shape[2], size)
    tensors = [linear, place, missing, weight, out]
    sizes = (networks, len(place), columns, place.shape[2], features - 2, size)
    native.call(SOURCE, f"embed_{native.SUFFIX[out.dtype]}", tensors, sizes)
    return out


def embed_backward(
    grad: Tensor, linear: Tensor, place: Tensor, missing: Tensor, bins: int
) -> Tensor:
    """Return the gradient `[S, F, bins + 2, D]` of the weights."""
    networks, columns, rows, size = grad.shape
    found = grad.new_empty(networks, columns, bins + 2, size)
    tensors = [grad, linear, place, missing, found]
    sizes = (networks, len(place), columns, rows, bins, size)
    native.call(SOURCE, f"embed_backward_{native.SUFFIX[found.dtype]}", tensors, sizes)
    return found
