"""SDIM's Triton kernels against the definition: codes bit by bit, results and gradients."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hashtab.kernels import sdim
from hashtab.kernels.core import to_ragged
from hashtab.kernels.sdim.packing import Packing
from tests.kernels.fused import (
    DEVICE,
    DTYPES,
    GPU,
    LENGTHS,
    OPERATORS,
    Case,
    Operator,
    assert_accurate,
    assert_same_bits,
    attend,
    attend_at,
    attend_last,
    candidates,
    cases,
    draw,
    dtypes,
    encode,
    on_plane,
    operators,
    read,
    shorten_pieces,
    with_queries,
)
from tests.kernels.histories import Histories
from tests.tolerances import TOLERANCE

pytestmark = [pytest.mark.gpu] if GPU else []
ops: Any = torch.ops.hashtab

SMALL = Case(torch.float32, 8, 3, 4)


@pytest.fixture(autouse=True)
def poisoned_integers(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """Fill fresh int32 memory with ones, as floating memory with NaN: codes nobody wrote."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(-1) if fresh.dtype == torch.int32 else fresh

        return poisoned

    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def bits(codes: Tensor, tau: int) -> Tensor:
    """Return the signature `[N, M]` that codes `[N, G]` were made of."""
    return ((codes[..., None] >> torch.arange(tau, device=codes.device)) & 1).flatten(1)


def assert_codes(found: Tensor, x: Tensor, planes: Tensor, tau: int) -> None:
    """Compare with the reference: only vectors on a plane but for rounding may turn a bit."""
    expected = sdim.codes(x, planes, tau, impl="reference")
    assert found.shape == expected.shape
    assert found.dtype == torch.int32
    assert int(found.min()) >= 0
    assert int(found.max()) < 2**tau
    turned = bits(found, tau) != bits(expected, tau)
    assert not (turned & ~on_plane(x, planes)).any()


def near_planes(rows: int, case: Case, scales: bool = False) -> tuple[Tensor, Tensor]:
    """Return vectors, a few of them on a plane but for rounding, and planes of like size or not."""
    dtype, size, tau, groups = case
    h = Histories.random([rows], size=size, planes=tau * groups)
    values, planes = h.values, h.planes.double()
    few = values[: min(20, rows)]
    normals = planes[:, torch.arange(len(few)) % planes.shape[1]].T
    few -= (few * normals).sum(1, keepdim=True) / normals.square().sum(1, keepdim=True) * normals
    if scales:
        planes = planes * torch.logspace(-6, 4, planes.shape[1]).double()
    return values.to(DEVICE, dtype), planes.to(DEVICE, torch.float32)


CODES = [
    (1, 64, 8),
    (1, 7, 256),
    (2, 5, 24),
    (3, 16, 40),
    (3, 33, 60),
    (4, 3, 60),
    (5, 16, 100),
    (6, 1, 128),
    (7, 2, 24),
    (8, 16, 256),
    (9, 1, 8),
    (10, 64, 40),
]


@dtypes
@pytest.mark.parametrize(("tau", "groups", "size"), CODES)
def test_codes_are_those_of_the_reference(
    dtype: torch.dtype, tau: int, groups: int, size: int
) -> None:
    x, planes = near_planes(20_000 if GPU else 100, Case(dtype, size, tau, groups))
    assert_codes(sdim.codes(x, planes, tau, impl="triton"), x, planes, tau)


@dtypes
@pytest.mark.parametrize(("tau", "groups", "size"), [(1, 16, 8), (3, 16, 64), (5, 8, 256)])
def test_planes_may_be_of_very_different_size(
    dtype: torch.dtype, tau: int, groups: int, size: int
) -> None:
    x, planes = near_planes(2000 if GPU else 50, Case(dtype, size, tau, groups), scales=True)
    assert_codes(sdim.codes(x, planes, tau, impl="triton"), x, planes, tau)
    h = replace(
        draw([len(x)], Case(dtype, size, tau, groups)),
        values=x,
        planes=planes,
    )
    for packed in packed_by_operators(h, tau):
        assert_codes(unpacked(packed, tau, groups)[: len(x)], x, planes, tau)


@dtypes
def test_a_product_of_exactly_zero_is_not_above_zero(dtype: torch.dtype) -> None:
    few = torch.Generator().manual_seed(0)
    x, planes = (
        torch.randint(-3, 4, shape, generator=few).to(DEVICE) for shape in ((500, 24), (24, 48))
    )
    rows, normals = x.to(dtype), planes.float()
    assert (rows.float() @ normals == 0).any()
    expected = sdim.codes(rows, normals, 3, impl="reference")
    assert torch.equal(sdim.codes(rows, normals, 3, impl="triton"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, *DTYPES[2:]], ids=str)
def test_planes_may_be_of_any_dtype(dtype: torch.dtype) -> None:
    x, planes = near_planes(40, SMALL)
    assert_codes(sdim.codes(x, planes.to(dtype), 3, impl="triton"), x, planes.to(dtype), 3)
    h = replace(draw([40], SMALL), planes=planes.to(dtype))
    assert_accurate(h, 3, attend)


@cases
def test_planes_in_the_dtype_of_the_rows_hash_exactly(case: Case) -> None:
    h = draw([37, 0, 12, *([3000] if GPU else [])], case)
    h = replace(h, planes=h.planes.to(case.dtype))
    for packed in packed_by_operators(h, case.tau):
        assert_codes(unpacked(packed, case.tau, case.groups), h.values, h.planes, case.tau)
    table = torch.zeros(len(h.offsets) - 1, case.groups, 2**case.tau, case.size, device=DEVICE)
    packed = ops.sdim_fused_read(table, candidates(h), h.planes, case.tau)[1]
    assert_codes(unpacked(packed, case.tau, case.groups), h.queries, h.planes, case.tau)


def test_the_lowest_bit_is_the_first_and_a_product_of_zero_gives_none() -> None:
    rows = [[1.0, -1.0, 2.0, 0.0], [-1.0, 1.0, 0.0, 3.0], [0.0, -0.0, 0.0, 0.0]]
    for dtype in DTYPES:
        x = torch.tensor(rows, dtype=dtype, device=DEVICE)
        found = sdim.codes(x, torch.eye(4, device=DEVICE), 2, impl="triton")
        assert found.tolist() == [[1, 1], [2, 2], [0, 0]]


def packed_by_operators(h: Histories, tau: int) -> list[Tensor]:
    """Return the packed codes of behaviours that fused operators leave for backward."""
    history, queries = (h.values, h.offsets), candidates(h)
    at = (h.queries, h.query_offsets, h.cuts, h.planes, tau, None)
    return [
        ops.sdim_fused_encode(*history, h.planes, tau)[1],
        ops.sdim_fused_attend(*history, queries[:, :1], h.planes, tau, True)[1],
        ops.sdim_fused_attend(*history, queries, h.planes, tau, True)[1],
        ops.sdim_fused_attend_at(*history, *at)[1],
    ]


def unpacked(packed: Tensor, tau: int, groups: int) -> Tensor:
    """Return the codes `[N, G]` that words hold."""
    width = Packing(tau, groups).bits
    shift = torch.arange(0, 32, width, dtype=torch.int32, device=packed.device)
    codes: Tensor = (packed[..., None] >> shift) & (2**tau - 1)
    return codes.flatten(1)[:, :groups]


@cases
def test_operators_leave_the_codes_of_behaviours_and_candidates(case: Case) -> None:
    h = draw([37, 0, 12], case)
    expected = sdim.codes(h.values, h.planes, case.tau, impl="reference")
    for packed in packed_by_operators(h, case.tau):
        assert torch.equal(unpacked(packed, case.tau, case.groups), expected)
    expected = sdim.codes(h.queries, h.planes, case.tau, impl="reference")
    table = torch.zeros(3, case.groups, 2**case.tau, case.size, device=DEVICE)
    packed = ops.sdim_fused_read(table, candidates(h), h.planes, case.tau)[1]
    assert torch.equal(unpacked(packed, case.tau, case.groups), expected)


@cases
def test_encode_agrees_with_the_definition(case: Case) -> None:
    assert_accurate(draw(LENGTHS, case), case.tau, encode)


@cases
@pytest.mark.parametrize("count", [1, 20])
def test_read_agrees_with_the_definition(case: Case, count: int) -> None:
    assert_accurate(draw(LENGTHS, case, queries=count), case.tau, read)


@cases
@pytest.mark.parametrize("count", [1, 3])
def test_attend_agrees_with_the_definition(case: Case, count: int) -> None:
    assert_accurate(draw(LENGTHS, case, queries=count), case.tau, attend)


@pytest.mark.parametrize("tau", [3, 8], ids=["through a table", "in rounds"])
def test_attend_takes_many_candidates(tau: int) -> None:
    for dtype in DTYPES:
        assert_accurate(draw([5, 0, 40], Case(dtype, 24, tau, 5), queries=100), tau, attend)


@cases
@pytest.mark.parametrize("last", [None, 1, 50])
def test_attend_at_agrees_with_the_definition(case: Case, last: int | None) -> None:
    h = draw(LENGTHS, case, queries=100 if GPU else 6)
    assert_accurate(h, case.tau, partial(attend_at, last=last))


@dtypes
@pytest.mark.parametrize("operator", [encode, attend, attend_at, attend_last])
def test_users_longer_than_a_piece(
    dtype: torch.dtype, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_pieces(monkeypatch, 16)
    for tau, groups in ((3, 3), (8, 1)):
        h = draw([15, 16, 0, 17, 32, 150, 1], Case(dtype, 24, tau, groups), queries=2)
        assert_accurate(h, tau, operator)


def test_users_may_have_any_number_of_queries() -> None:
    for dtype in DTYPES:
        h = with_queries([9, 0, 50, 5, 33, 1], [0, 17, 0, 1, 40, 0], SMALL._replace(dtype=dtype))
        for last in (None, 7):
            assert_accurate(h, 3, partial(attend_at, last=last))


@pytest.mark.parametrize("tau", [3, 8])
@pytest.mark.parametrize(
    ("lengths", "count"), [([0, 0], 3), ([5, 40], 0), ([5], 1), ([0], 0), ([], 0)]
)
def test_nothing_gives_nothing(lengths: list[int], count: int, tau: int) -> None:
    h = with_queries(lengths, [count] * len(lengths), SMALL._replace(tau=tau))
    for operator in OPERATORS:
        assert_accurate(h, tau, operator)


@operators
@pytest.mark.parametrize("tau", [2, 7])
def test_rows_of_zeros_alone_in_a_bucket_read_zeros(operator: Operator, tau: int) -> None:
    h = draw([40, 9], SMALL._replace(tau=tau, groups=2), queries=20)
    h.values[::3] = 0
    assert_accurate(h, tau, operator)
    h.values.zero_()
    result, grad = operator(h, tau, "triton")
    assert not result.any()
    assert operator is encode or not grad.any()


@pytest.mark.parametrize(
    ("last", "powers"), [(None, 1), *((last, 4) for last in (None, 1, 30, 2**62))]
)
def test_behaviours_of_very_different_size_leave_nothing_behind(
    last: int | None, powers: int
) -> None:
    h = draw([2000 if GPU else 150], Case(torch.float32, 16, 3, 4), queries=20)
    spread = torch.logspace(-powers, powers, len(h.values))
    shuffled = spread[torch.randperm(len(spread), generator=torch.Generator())]
    h.values.mul_(shuffled[:, None].to(DEVICE))
    assert_accurate(h, 3, partial(attend_at, last=last))


@pytest.mark.parametrize("scale", [2.0**-33, 2.0**33])
def test_interests_do_not_depend_on_the_size_of_vectors(scale: float) -> None:
    h = draw([30, 5], SMALL)
    for operator in (read, attend, attend_at, attend_last):
        interest, grad = operator(h, 3, "triton")
        found = operator(replace(h, values=h.values * scale), 3, "triton")
        torch.testing.assert_close(found[0], interest, **TOLERANCE[torch.float32])
        torch.testing.assert_close(found[1] * scale, grad, **TOLERANCE[torch.float32])


def test_padded_histories_are_turned_ragged_before() -> None:
    h = draw([7, 0, 20], SMALL)
    padded = torch.full((3, 25, 8), torch.nan, device=DEVICE)
    for user, (first, length) in enumerate(zip([0, 7, 7], [7, 0, 20], strict=True)):
        padded[user, :length] = h.values[first : first + length]
    values, offsets = to_ragged(padded, h.offsets.diff())
    for operator in OPERATORS:
        found = operator(replace(h, values=values, offsets=offsets), 3, "triton")
        assert_same_bits(found, operator(h, 3, "triton"))


@dtypes
def test_queries_may_have_another_dtype(dtype: torch.dtype) -> None:
    h = draw([20, 0, 12], SMALL._replace(dtype=dtype))
    for other in DTYPES:
        exactly = replace(h, queries=h.queries.to(other))
        for operator in (read, attend, attend_at):
            assert_accurate(exactly, 3, operator)
