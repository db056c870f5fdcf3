"""The walk over queries at cuts, called directly: the interpreter runs it in float32.

Through the public functions it is for bfloat16 on a GPU, which the interpreter cannot multiply.
"""

from dataclasses import replace

import pytest
import torch
import triton.language as tl
from torch import Tensor

from hashtab.kernels.sdim import reference
from hashtab.kernels.sdim.packing import Packing
from hashtab.kernels.sdim.triton import hashing
from hashtab.kernels.sdim.triton import walk as kernels
from tests.kernels.fence import Fence
from tests.kernels.fused import DEVICE, Case, assert_same_bits, draw, error, shorten_pieces
from tests.kernels.histories import Histories, HistoriesById, with_wrong_ids
from tests.tolerances import TOLERANCE

NEVER = 2**62  # as the kernels have it
CASES = [
    Case(torch.float32, 8, 3, 16),
    Case(torch.float32, 24, 3, 13),
    Case(torch.float32, 40, 2, 16),
    Case(torch.float32, 24, 4, 13),  # in two walks
]


def walk(h: Histories, case: Case, grad: Tensor, last: int = NEVER) -> tuple[Tensor, Tensor]:
    """Return interests and the gradient of the behaviours."""
    packing, ids = Packing(case.tau, case.groups), h.keywords.get("ids")
    packed = hashing.pack_codes(h.values, h.planes, case.tau, ids=ids)
    query_packed = hashing.pack_codes(h.queries, h.planes, case.tau)
    asked = (packed, query_packed, h.query_offsets, h.cuts, packing, last, ids)
    interest = kernels.attend_at(h.values, h.offsets, *asked)
    return interest, kernels.attend_at_backward(grad, h.values, h.offsets, *asked)


def definition(h: Histories, case: Case, grad: Tensor, last: int = NEVER) -> tuple[Tensor, Tensor]:
    """Return what `walk` returns, in float64 and rounded."""
    codes, query_codes = (reference.codes(x, h.planes, case.tau) for x in (h.values, h.queries))
    values, tau = h.values.double(), case.tau
    asked = (query_codes, h.query_offsets, h.cuts, tau, last)
    interest = reference.attend_at(values, h.offsets, codes, *asked)
    grads = reference.attend_at_backward(grad.double(), values, h.offsets, codes, *asked)
    return interest.float(), grads.float()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("rows", "last"),  # of a piece, with users in one and in several; that a query sees
    [(2048, NEVER), (32, NEVER), (32, 40), (32, 1), (2048, 90)],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_walk_agrees_with_the_definition(
    case: Case, rows: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_pieces(monkeypatch, rows)
    h = draw([0, 5, 1, 70, 100, 0], case, queries=8)
    grad = torch.randn(h.queries.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = walk(h, case, grad, last)
    expected = definition(h, case, grad, last)
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("last", [NEVER, 10])
def test_16_bit_products_keep_the_digits_of_sums(
    last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gradients that point one way and add up, where `last` takes nearly all of them out."""
    in_float32 = kernels._code
    monkeypatch.setattr(kernels, "_code", lambda *a: in_float32(*a) | {"OPERAND": tl.float16})
    case = Case(torch.float16, 8, 3, 16)
    h = draw([100], case, queries=100)
    h.cuts.copy_(torch.arange(1, 101))
    noise = torch.randn(h.queries.shape, generator=torch.Generator().manual_seed(1))
    grad = (1 + 0.1 * noise).half().to(DEVICE)
    for found, exact in zip(
        walk(h, case, grad, last), definition(h, case, grad, last), strict=True
    ):
        assert error(found, exact.double()) <= 2 * error(exact.half(), exact.double())


@pytest.mark.parametrize(("ids", "last"), [(torch.int64, NEVER), (torch.int32, 40)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_walk_by_id_is_that_over_the_behaviours(
    case: Case, ids: torch.dtype, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_pieces(monkeypatch, 32)
    h = HistoriesById.of_part(draw([0, 5, 1, 70, 0], case, queries=8), ids)
    grad = torch.randn(h.queries.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_same_bits([*walk(h, case, grad, last)], [*walk(h.gathered, case, grad, last)])


@pytest.mark.parametrize("queries", [17, 40])
def test_more_queries_at_one_cut_than_a_block_takes(queries: int) -> None:
    case = CASES[0]
    h = draw([30, 4], case, queries=queries)
    h.cuts[:queries], h.cuts[queries:] = 11, 0
    grad = torch.ones_like(h.queries)
    found = walk(h, case, grad)
    torch.testing.assert_close(found, definition(h, case, grad), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("last", [NEVER, 7])
@pytest.mark.parametrize("cuts", [[30] * 16 + [0] * 44, [40] * 44 + [5] * 16])
def test_a_walk_ends_whatever_the_cuts(
    cuts: list[int], last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[0]
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    h = draw([40], case, queries=60)
    h.cuts.copy_(torch.tensor(cuts))
    interest, grad = walk(h, case, torch.ones_like(h.queries), last)
    assert interest.shape == h.queries.shape
    assert grad.shape == h.values.shape


@pytest.mark.parametrize(
    "wrong",
    [
        {"cuts": [-3, 40, 9, 21, 70, *[0] * 15, *range(20, 0, -1)]},
        {"offsets": [0, -5, 50]},
        {"offsets": [40, 3, 1]},
        {"offsets": [-30, 60, 30]},
        {"offsets": [-30, 30], "cuts": [*range(11, 31), *[0] * 20]},
        {"query_offsets": [0, -5, 90]},
        {"query_offsets": [60, 3, 1]},
    ],
    ids=str,
)
@pytest.mark.parametrize(("by_id", "last"), [(False, NEVER), (False, 10), (True, 10)])
def test_wrong_cuts_and_offsets_touch_nothing_outside(
    wrong: dict[str, list[int]],
    by_id: bool,
    last: int,
    fence: Fence,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten_pieces(monkeypatch, 16)
    h = draw([18, 12], CASES[0], queries=20)
    h = HistoriesById.of_part(h) if by_id else h
    h = replace(h, **{name: torch.tensor(x, device=DEVICE) for name, x in wrong.items()})
    assert_touches_nothing_outside(h, last, fence)


def test_wrong_ids_touch_nothing_outside(fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_pieces(monkeypatch, 16)
    h = HistoriesById.of_part(draw([20, 12], CASES[0], queries=20))
    assert_touches_nothing_outside(with_wrong_ids(h), NEVER, fence)


def assert_touches_nothing_outside(h: Histories, last: int, fence: Fence) -> None:
    h = replace(h, **{name: fence.around(tensor) for name, tensor in vars(h).items()})
    for x in walk(h, CASES[0], fence.around(torch.ones_like(h.queries)), last):
        assert x.isfinite().all()  # what lies in margins is not
    fence.assert_whole()
