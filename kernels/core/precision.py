"""Number formats: what sums are kept in, and a matrix product that is float32 for certain."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# The settings are the process's, so one thread at a time changes and restores them.
_SETTINGS = threading.Lock()
_mkldnn: Any = torch.backends.mkldnn  # its `matmul` is unknown to type checkers


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over rows of `dtype`: float32, or float64 for float64 rows."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float32_product(x: Tensor, planes: Tensor) -> Tensor:
    """Return `x.float() @ planes.float()` whatever autocast and TF32 settings are in force."""
    with torch.autocast(x.device.type, enabled=False), _ieee_matmul():
        return x.float() @ planes.float()


@contextmanager
def _ieee_matmul() -> Iterator[None]:
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, _mkldnn.matmul)
    with _SETTINGS:
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
