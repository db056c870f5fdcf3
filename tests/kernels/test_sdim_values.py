"""Every implementation of SDIM against its definition, values and gradients."""

import pytest
import torch
from torch import Tensor

from hashtab.kernels import sdim
from hashtab.kernels.core.dispatch import Impl
from hashtab.kernels.sdim import reference
from tests.kernels.histories import Histories
from tests.tolerances import TOLERANCE

LENGTHS = [0, 1, 63, 111, 1000]
IMPLS: tuple[Impl, ...] = ("reference", "native")
impls = pytest.mark.parametrize("impl", IMPLS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def by_mask(h: Histories, tau: int, last: int | None = None) -> tuple[Tensor, Tensor]:
    """The definition's interest and its gradient under an upstream of cosines, in float64."""
    keys = (sdim.codes(h.values, h.planes, tau), sdim.codes(h.queries, h.planes, tau))
    values = h.values.double().requires_grad_()
    interest = reference.attend_at_by_mask(values, h.offsets, *keys, h.query_offsets, h.cuts, last)
    (grad,) = torch.autograd.grad(interest, values, upstream(interest))
    return interest.detach(), grad


def upstream(interest: Tensor) -> Tensor:
    return torch.arange(interest.numel(), dtype=torch.float64).view(interest.shape).cos()


@impls
@dtypes
@pytest.mark.parametrize("size", [24, 40, 60, 100])
@pytest.mark.parametrize("last", [None, 1, 50])
def test_attend_at_agrees_with_the_definition(
    impl: Impl, dtype: torch.dtype, size: int, last: int | None
) -> None:
    h = Histories.random(LENGTHS, size=size, planes=20, dtype=dtype)
    expected, expected_grad = by_mask(h, 5, last)
    values = h.values.requires_grad_()
    interest = sdim.attend_at(
        values, h.offsets, h.queries, h.query_offsets, h.cuts, h.planes, 5, last=last, impl=impl
    )
    assert interest.dtype == dtype
    torch.testing.assert_close(interest.double(), expected, **TOLERANCE[dtype])
    (grad,) = torch.autograd.grad(interest, values, upstream(interest).to(dtype))
    torch.testing.assert_close(grad.double(), expected_grad, **TOLERANCE[dtype])
