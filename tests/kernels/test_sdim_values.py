"""Every implementation of SDIM against its definition, values and gradients."""

import pytest
import torch
from torch import Tensor

from hashtab.kernels import sdim
from hashtab.kernels.core.dispatch import Impl
from hashtab.kernels.core.ragged import segment_of
from hashtab.kernels.sdim import reference
from hashtab.kernels.sdim.api import _AttendAt
from tests.kernels.histories import Histories
from tests.tolerances import TOLERANCE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS = [0, 1, 63, 111, 1000]
IMPLS: tuple[Impl, ...] = ("reference", "native")
impls = pytest.mark.parametrize("impl", IMPLS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def by_mask(h: Histories, tau: int, last: int | None = None) -> tuple[Tensor, Tensor]:
    """The definition's interest and its gradient under `upstream`, in float64."""
    keys = (sdim.codes(h.values, h.planes, tau), sdim.codes(h.queries, h.planes, tau))
    values = h.values.double().requires_grad_()
    interest = reference.attend_at_by_mask(values, h.offsets, *keys, h.query_offsets, h.cuts, last)
    (grad,) = torch.autograd.grad(interest, values, upstream(interest))
    return interest.detach(), grad


def upstream(interest: Tensor) -> Tensor:
    return torch.arange(interest.numel(), dtype=torch.float64).view(interest.shape).cos()


def attend_at(
    h: Histories, tau: int, last: int | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """The operator's interest and its gradient under `upstream`, in the values' dtype."""
    values = h.values.clone().requires_grad_()
    interest = sdim.attend_at(
        values, h.offsets, h.queries, h.query_offsets, h.cuts, h.planes, tau, last=last, impl=impl
    )
    (grad,) = torch.autograd.grad(interest, values, upstream(interest).to(interest.dtype))
    return interest.detach(), grad


@impls
@dtypes
@pytest.mark.parametrize(("size", "last"), [(24, None), (40, 1), (60, 50), (100, None)])
def test_attend_at_agrees_with_the_definition(
    impl: Impl, dtype: torch.dtype, size: int, last: int | None
) -> None:
    h = Histories.random(LENGTHS, size=size, planes=20, dtype=dtype)
    expected, expected_grad = by_mask(h, 5, last)
    interest, grad = attend_at(h, 5, last, impl)
    assert interest.dtype == grad.dtype == dtype
    torch.testing.assert_close(interest.double(), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(grad.double(), expected_grad, **TOLERANCE[dtype])


@impls
@pytest.mark.parametrize("tau", [1, 2, 10, 16])
def test_narrow_and_wide_codes(impl: Impl, tau: int) -> None:
    h = Histories.random([40, 0, 7], planes=2 * tau)
    expected, expected_grad = by_mask(h, tau, 5)
    interest, grad = attend_at(h, tau, 5, impl)
    torch.testing.assert_close(interest, expected, **TOLERANCE[torch.float64])
    torch.testing.assert_close(grad, expected_grad, **TOLERANCE[torch.float64])


@impls
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_values_are_hashed_as_stored_and_summed_in_float32(
    impl: Impl, dtype: torch.dtype
) -> None:
    h = Histories.random([300, 20], dtype=dtype)
    expected, expected_grad = by_mask(h, 3)
    interest, grad = attend_at(h, 3, impl=impl)
    assert interest.dtype == grad.dtype == dtype
    torch.testing.assert_close(interest.double(), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(grad.double(), expected_grad, **TOLERANCE[dtype])
    assert sdim.encode(h.values, h.offsets, h.planes, 3, impl=impl).dtype == torch.float32


@pytest.mark.parametrize("last", [None, 300])
@pytest.mark.parametrize("zeros", [0, 200])
def test_taking_behaviours_back_out_does_not_drift(last: int | None, zeros: int) -> None:
    h = Histories.random([4000], size=32, planes=20, queries=200, dtype=torch.float32)
    spread = torch.logspace(-4, 4, len(h.values))[torch.randperm(len(h.values))]
    h.values.mul_(spread[:, None])
    h.values[torch.randperm(len(h.values))[:zeros]] = 0
    expected, expected_grad = by_mask(h, 5, last)
    interest, grad = attend_at(h, 5, last, "native")
    torch.testing.assert_close(interest.double(), expected, **TOLERANCE[torch.float32])
    scale = expected_grad.abs().amax(1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(
        grad.double() / scale, expected_grad / scale, **TOLERANCE[torch.float32]
    )


@impls
@pytest.mark.parametrize("last", [None, 1, 3])
def test_rows_of_zeros_alone_in_a_bucket_read_zeros(impl: Impl, last: int | None) -> None:
    # What rounding leaves of rows that were taken out again must not be scaled up to length one.
    h = Histories.random([40, 9], planes=4, queries=30)
    h.values[::3] = 0
    expected, expected_grad = by_mask(h, 2, last)
    interest, grad = attend_at(h, 2, last, impl)
    torch.testing.assert_close(interest, expected, **TOLERANCE[torch.float64])
    torch.testing.assert_close(grad, expected_grad, **TOLERANCE[torch.float64])


@impls
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e20])
def test_interests_do_not_depend_on_the_size_of_vectors(impl: Impl, size: float) -> None:
    h = Histories.random([30, 5], dtype=torch.float32)
    queries = h.queries.view(2, 5, -1)
    table = sdim.encode(h.values * size, h.offsets, h.planes, 3, impl=impl)
    expected = sdim.attend(h.values, h.offsets, queries, h.planes, 3, impl=impl)
    found = sdim.read(table, queries, h.planes, 3, impl=impl)
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float32])


@impls
@dtypes
def test_encode_sums_each_bucket(impl: Impl, dtype: torch.dtype) -> None:
    h = Histories.random(LENGTHS, dtype=dtype)
    keys = sdim.codes(h.values, h.planes, 3).long()
    user = segment_of(h.offsets, len(h.values))
    values = h.values.double().requires_grad_()
    expected = torch.zeros(5, 4, 8, 8, dtype=torch.float64)
    for g in range(4):
        expected[:, g] = expected[:, g].index_put((user, keys[:, g]), values, accumulate=True)
    (expected_grad,) = torch.autograd.grad(expected, values, upstream(expected))

    values = h.values.requires_grad_()
    table = sdim.encode(values, h.offsets, h.planes, 3, impl=impl)
    (grad,) = torch.autograd.grad(table, values, upstream(table).to(table.dtype))
    torch.testing.assert_close(table.double(), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(grad.double(), expected_grad, **TOLERANCE[dtype])


@impls
@dtypes
def test_attend_reads_what_encode_wrote(impl: Impl, dtype: torch.dtype) -> None:
    h = Histories.random(LENGTHS, dtype=dtype)
    queries = h.queries.view(5, 5, -1)
    values = h.values.requires_grad_()
    results = []
    for interest in (
        sdim.attend(values, h.offsets, queries, h.planes, 3, impl=impl),
        sdim.read(
            sdim.encode(values, h.offsets, h.planes, 3, impl=impl), queries, h.planes, 3, impl=impl
        ),
    ):
        weights = upstream(interest).to(dtype)
        results.append((interest, *torch.autograd.grad(interest, values, weights)))
    torch.testing.assert_close(*results, **TOLERANCE[dtype])


@impls
@pytest.mark.parametrize("last", [None, 2])
def test_gradcheck(impl: Impl, last: int | None) -> None:
    h = Histories.random([4, 0, 1], size=3, planes=6, queries=3)
    values = h.values.requires_grad_()

    def interest(values: Tensor) -> Tensor:
        # Codes are constants: without this, a step across a plane is a jump.
        keys = (sdim.codes(h.values, h.planes, 2), sdim.codes(h.queries, h.planes, 2))
        arguments = (h.offsets, *keys, h.query_offsets, h.cuts, 2, last, impl)
        result: Tensor = _AttendAt.apply(values, *arguments)  # type: ignore[no-untyped-call]
        return result

    assert torch.autograd.gradcheck(interest, values)


@impls
def test_gradcheck_of_encode_and_read(impl: Impl) -> None:
    h = Histories.random([4, 0, 1], size=3, planes=6, queries=2)
    queries = h.queries.view(3, 2, 3)
    table = torch.randn(3, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: sdim.read(t, queries, h.planes, 2, impl=impl), table)
    values = h.values.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: sdim.encode(v, h.offsets, h.planes, 2, impl=impl), values
    )


def test_sampled_form_without_norm_converges_to_its_expectation() -> None:
    h = Histories.random([30], size=16, queries=4)
    queries = h.queries[None]
    expected = sdim.expected(h.values, h.offsets, queries, 3)
    errors = []
    for groups in (100, 10_000):
        planes = torch.randn(16, 3 * groups, generator=torch.Generator().manual_seed(1))
        table = sdim.encode(h.values, h.offsets, planes, 3)[0]
        keys = sdim.codes(queries, planes, 3)[0].long()
        sampled = torch.stack([table[torch.arange(groups), key].mean(0) for key in keys])
        errors.append(((sampled - expected[0]).square().mean() / expected.square().mean()).sqrt())
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 5  # a hundred times as many samples: a tenth of the error


def test_expected_gives_the_weights_of_the_paper() -> None:
    behaviour = torch.tensor([[1.0, 0.0]])
    for cosine, weight in ((1.0, 1.0), (0.5, 0.296), (0.0, 0.125), (-1.0, 0.0)):
        query = torch.tensor([[[cosine, (1 - cosine**2) ** 0.5]]])
        interest = sdim.expected(behaviour, torch.tensor([0, 1]), query, 3)
        assert interest[0, 0, 0].item() == pytest.approx(weight, abs=1e-3)
