"""Which implementation runs: a definition in PyTorch, or native code where it can."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from hashtab.kernels.core import native

Impl = Literal["auto", "reference", "native"]


def check_impl(impl: str) -> None:
    """Refuse a name that is not an implementation."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl=}")


def use_native(impl: str, device: torch.device, source: Path) -> bool:
    """Decide whether native code computes an operator.

    Args:
        impl: `"auto"`, `"reference"` or `"native"`, checked.
        device: where the operator's tensors lie.
        source: the C file that implements the operator.

    Returns:
        True for native code. `"auto"` takes it on the CPU where it builds, and otherwise the
        definition, with one warning a process if a missing compiler is the reason.

    Raises:
        RuntimeError: `"native"` was asked for and cannot run, with the reason.
    """
    if impl == "reference" or (impl == "auto" and device.type != "cpu"):
        return False
    reason = native.why_not(source) if device.type == "cpu" else f"tensors are on {device}"
    if reason is None:
        return True
    if impl == "native":
        raise RuntimeError(f"impl='native' cannot run: {reason}")
    _warn_once(reason)
    return False


def native_builds(source: Path) -> Callable[[], bool]:
    """Return a function that says whether a C file builds here, a constant to torch.compile.

    What runs is decided while a graph is traced, and tracing cannot look for a compiler.
    """

    def builds() -> bool:
        return native.why_not(source) is None

    torch.compiler.assume_constant_result(builds)
    return builds


def use_native_real(impl: str, x: Tensor, source: Path, builds: Callable[[], bool]) -> bool:
    """Decide as `use_native`, for native code that is for float32 and float64 alone.

    Args:
        impl: which implementation, checked.
        x: a tensor of the operator's dtype, where its tensors lie.
        source: the C file that implements the operator.
        builds: `native_builds` of the file.

    Raises:
        RuntimeError: `"native"` was asked for and cannot run, with the reason.
    """
    real = x.dtype in native.SUFFIX
    if impl == "reference" or (impl == "auto" and (torch.compiler.is_exporting() or not real)):
        return False
    if not real:
        raise RuntimeError(
            f"impl='native' cannot run: it is for float32 and float64, not {x.dtype}"
        )
    if x.device.type == "cpu" and builds():
        return True
    return use_native(impl, x.device, source)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"native code is not available, using the slower PyTorch definition: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
