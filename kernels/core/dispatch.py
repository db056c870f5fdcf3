"""Which implementation runs: a definition in PyTorch, native code or Triton where they can."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from hashtab.kernels.core import native

Impl = Literal["auto", "reference", "native"]


_OLDEST_CAPABILITY = (8, 0)  # bfloat16 matrix products


def check_impl(impl: str, choices: tuple[str, ...] = get_args(Impl)) -> None:
    """Refuse a name that is not an implementation."""
    if impl not in choices:
        raise ValueError(f"impl must be one of {choices}, got {impl=}")


def use_triton(impl: str, device: torch.device, unfit: str | None = None) -> bool:
    """Decide whether Triton kernels compute an operator.

    Args:
        impl: which implementation, checked.
        device: where the operator's tensors lie.
        unfit: why the operator's own kernels are not for these arguments; None when they are.

    Returns:
        True for Triton. `"auto"` takes it on a GPU, where it can run; `"triton"` also on a CPU
        under Triton's interpreter (TRITON_INTERPRET=1), which is for tests.

    Raises:
        RuntimeError: `"triton"` was asked for and cannot run, with the reason.
    """
    if impl not in ("auto", "triton") or (impl == "auto" and device.type != "cuda"):
        return False
    reason = why_not_triton(device) or unfit
    if reason is not None and impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run: {reason}")
    return reason is None


def interpreted() -> bool:
    """Return whether Triton kernels run on CPU tensors, under Triton's interpreter, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


HOPPER = (9, 0)  # what kernels are measured on, and taken for where there is no GPU


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else HOPPER


def before_hopper(rows: Tensor) -> bool:
    """Return whether `rows` lie on an older GPU, whose blocks have less memory."""
    return bool(capability(rows.device) < HOPPER)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not_triton(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on a device, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "kernels are for NVIDIA's GPUs"
        if interpreted():
            return "TRITON_INTERPRET=1 is set, and the interpreter takes CPU tensors"
        found = torch.cuda.get_device_capability(device)
        if found < _OLDEST_CAPABILITY:
            return f"the GPU's compute capability is {found}, below {_OLDEST_CAPABILITY}"
        return None
    if device.type == "cpu" and interpreted():
        return None
    return f"tensors are on {device}; on a CPU kernels run interpreted, with TRITON_INTERPRET=1"


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
