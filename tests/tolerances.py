"""The one table of numerical tolerances: how far a faster path may be from its definition."""

from typing import TypedDict

import torch


class Tolerance(TypedDict):
    """Keyword arguments for `torch.testing.assert_close`."""

    rtol: float
    atol: float


TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}
