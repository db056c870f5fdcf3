"""Registration of operators with torch.library: one implementation function for CPU and CUDA."""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "hashtab"


def register(
    name: str, schema: str, implementation: Callable[..., object], fake: Callable[..., object]
) -> None:
    """Register `hashtab::name`.

    Gradients live in `torch.autograd.Function`s outside, which call forward and backward
    operators: so both are opaque to torch.compile and torch.export.

    Args:
        name: the operator's name.
        schema: arguments and result in the dispatcher's language; the first is a tensor.
        implementation: computes the operator from CPU or CUDA tensors; the GPU of the first one is
            then the current one, on which kernels are launched.
        fake: returns empty tensors of the result's shape, dtype and strides.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "cpu", implementation)
    torch.library.impl(qualified, "cuda", _on_gpu_of_first(implementation))
    torch.library.register_fake(qualified, fake)


def implemented_in(module: str, name: str) -> Callable[..., object]:
    """Return a function of a module that is imported at the first call: not all have Triton."""

    def run(*arguments: Any) -> object:
        return getattr(import_module(module), name)(*arguments)

    return run


def _on_gpu_of_first(implementation: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(implementation)
    def run(first: Tensor, *others: Any) -> object:
        with torch.cuda.device(first.device):
            return implementation(first, *others)

    return run


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Call a differentiable function that returns one tensor; torch leaves `apply` untyped.

    A tensor may be given in several places, which torch.compile refuses: the others get a view.
    """
    distinct = [
        given.view_as(given) if _is_one_of(given, arguments[:place]) else given
        for place, given in enumerate(arguments)
    ]
    result: Tensor = function.apply(*distinct)
    return result


def _is_one_of(given: Any, others: tuple[Any, ...]) -> bool:
    return isinstance(given, Tensor) and any(given is other for other in others)
