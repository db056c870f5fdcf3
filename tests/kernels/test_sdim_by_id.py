"""Behaviours by id: results and gradients are those of the rows of the table, gathered before."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hashtab.kernels import sdim
from hashtab.kernels.sdim.api import Impl
from tests.kernels.fence import Fence
from tests.kernels.fused import (
    DEVICE,
    FLOAT32_LIKE,
    GPU,
    Case,
    Operator,
    Recorder,
    assert_accurate,
    assert_same_bits,
    attend,
    attend_at,
    attend_last,
    cases,
    draw,
    dtypes,
    encode,
    encode_and_read,
    gradient_of,
    shorten_pieces,
    strided,
    with_queries,
)
from tests.kernels.histories import HistoriesById, with_wrong_ids
from tests.tolerances import TOLERANCE

pytestmark = [pytest.mark.gpu] if GPU else []
ops: Any = torch.ops.hashtab

SMALL = Case(torch.float32, 8, 3, 4)
LENGTHS = [0, 33, 0, 70, 1, *([3000, 5000] if GPU else []), 0]

operators = pytest.mark.parametrize(
    "operator",
    [encode, encode_and_read, attend, attend_at, attend_last],
    ids=lambda f: f.__name__,
)
index_dtypes = pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)


def draw_by_id(case: Case, ids: torch.dtype = torch.int64, *, queries: int = 3) -> HistoriesById:
    return HistoriesById.of_part(draw(LENGTHS, case, queries=queries), ids)


@pytest.mark.usefixtures("poisoned_memory")
@operators
@dtypes
@pytest.mark.parametrize(
    ("tau", "groups", "ids"), [(3, 16, torch.int64), (6, 2, torch.int32)], ids=str
)
def test_results_are_those_of_rows_gathered_before(
    operator: Operator,
    dtype: torch.dtype,
    tau: int,
    groups: int,
    ids: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten_pieces(monkeypatch, 16)
    h = draw_by_id(Case(dtype, 24, tau, groups), ids)
    found = operator(h, tau, "triton")
    assert torch.equal(found[0], operator(h.gathered, tau, "triton")[0])
    assert_accurate(h, tau, operator, found)
    assert_same_bits(operator(h, tau, "triton"), found)


@cases
def test_rows_of_any_size_and_codes_of_any_kind(case: Case) -> None:
    h = draw_by_id(case)
    for operator in (encode, attend, attend_at):
        result, grad = operator(h, case.tau, "triton")
        expected, grad_rows = operator(h.gathered, case.tau, "triton")
        assert torch.equal(result, expected)
        exact, size = (
            torch.zeros_like(grad, dtype=torch.float64).index_add(0, h.ids, rows)
            for rows in (grad_rows.double(), grad_rows.double().abs())
        )
        rounding = torch.finfo(case.dtype).eps * exact.abs() + FLOAT32_LIKE * size
        assert ((grad.double() - exact).abs() <= rounding).all()


@pytest.mark.parametrize("tau", [3, 8], ids=["through a table", "in rounds"])
def test_many_candidates(tau: int) -> None:
    h = draw_by_id(SMALL._replace(tau=tau), queries=100)
    found = attend(h, tau, "triton")
    assert torch.equal(found[0], attend(h.gathered, tau, "triton")[0])
    assert_accurate(h, tau, attend, found)


@operators
@pytest.mark.parametrize("impl", ["reference", "auto", *([] if GPU else ["native"])])
def test_every_implementation_takes_ids(operator: Operator, impl: Impl) -> None:
    h = draw_by_id(SMALL)
    found = operator(h, 3, impl)
    assert torch.equal(found[0], operator(h.gathered, 3, impl)[0])
    assert_accurate(h, 3, operator, found)


@operators
def test_float64_falls_back_to_the_definition(operator: Operator) -> None:
    h = draw_by_id(SMALL._replace(dtype=torch.float64))
    assert_same_bits(operator(h, 3, "auto")[:1], operator(h.gathered, 3, "auto")[:1])


@operators
@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("items", [0, 5])
@pytest.mark.parametrize("users", [0, 3])
def test_no_behaviours(operator: Operator, impl: Impl, items: int, users: int) -> None:
    h = with_queries([0] * users, [2] * users, SMALL)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    table = torch.ones(items, 8, device=DEVICE)
    found, grad = operator(HistoriesById(**(vars(h) | {"values": table}), ids=none), 3, impl)
    assert not found.any()
    assert grad.shape == table.shape
    assert not grad.any()


COUNTS = [0, 1, 15, 16, 17, 32, 83, 0, 16, 1, *([1_000_000] if GPU else []), 0, 3, 0]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("size", [1, 24, 256])
@index_dtypes
@pytest.mark.parametrize("tile", [16, 128])
def test_gradients_are_summed_by_item_exactly(
    size: int, ids: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_pieces(monkeypatch, tile)
    met, grads = met_items(COUNTS, size)
    found = ops.sdim_fused_sum_by_item(grads, met.to(ids), len(COUNTS))
    exact = torch.zeros(len(COUNTS), size, dtype=torch.float64, device=DEVICE)
    assert torch.equal(found.double(), exact.index_add_(0, met, grads.double()))


def met_items(counts: list[int], size: int) -> tuple[Tensor, Tensor]:
    """Return ids in any order, of items met so many times, and gradients of whole numbers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids = ids[torch.randperm(len(ids), generator=generator)]
    grads = torch.randint(-8, 9, (len(ids), size), generator=generator).float()
    return ids.to(DEVICE), grads.to(DEVICE)


@dtypes
def test_an_item_has_the_same_bits_whatever_others_get(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_pieces(monkeypatch, 16)
    ids, grads = met_items(COUNTS, 24)
    grads = (grads * torch.arange(1, len(ids) + 1, device=DEVICE)[:, None].rsqrt()).to(dtype)
    found = ops.sdim_fused_sum_by_item(grads, ids, len(COUNTS))
    for item in range(len(COUNTS)):
        own = ids == item
        alone = ops.sdim_fused_sum_by_item(grads[own], ids[own], len(COUNTS))
        assert torch.equal(alone[item], found[item])
        others = grads.masked_fill(~own[:, None], torch.nan)
        beside = ops.sdim_fused_sum_by_item(others, ids, len(COUNTS))
        assert torch.equal(beside[item], found[item])


@operators
def test_strided_ids_and_tables_are_read_right(operator: Operator) -> None:
    h = draw_by_id(SMALL)
    expected = operator(h, 3, "triton")
    for changed in (
        replace(h, ids=strided(h.ids)),
        replace(h, values=strided(h.values)),
        replace(h, values=h.values.t().contiguous().t()),
    ):
        assert_same_bits(operator(changed, 3, "triton"), expected)


@operators
def test_wrong_ids_touch_nothing_outside(
    operator: Operator, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_pieces(monkeypatch, 32)
    for tau, ids in ((3, torch.int64), (6, torch.int32)):
        h = with_wrong_ids(draw_by_id(SMALL._replace(tau=tau), ids))
        h = replace(h, **{name: fence.around(tensor) for name, tensor in vars(h).items()})
        for x in operator(h, tau, "triton"):
            assert x.isfinite().all()
        fence.assert_whole()


def by_id(operator: str, h: HistoriesById, **changed: Any) -> Tensor:
    """Call an operator on the CPU with some argument changed."""
    arguments = vars(h) | {"tau": 3, "queries": h.queries[:2], "cuts": h.cuts[:2]} | changed
    arguments |= {"query_offsets": torch.tensor([0, 1, 2])}
    if operator == "attend":
        arguments["queries"] = arguments["queries"][:, None]
    wanted = {
        "encode": ["values", "offsets", "planes", "tau"],
        "attend": ["values", "offsets", "queries", "planes", "tau"],
        "attend_at": ["values", "offsets", "queries", "query_offsets", "cuts", "planes", "tau"],
    }[operator]
    given = {name: arguments[name] for name in [*wanted, "ids"]}
    result: Tensor = getattr(sdim, operator)(**given, impl=arguments.get("impl", "auto"))
    return result


@pytest.mark.parametrize("operator", ["encode", "attend", "attend_at"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ids": torch.tensor([0, 1, -1])}, ValueError, r"within 0 .. 2, got ids\[2\] = -1"),
        ({"ids": torch.tensor([0, 3, 1])}, ValueError, r"within 0 .. 2, got ids\[1\] = 3"),
        ({"ids": torch.tensor([0, 1, 2**40])}, ValueError, rf"got ids\[2\] = {2**40}"),
        ({"ids": torch.tensor([0, 1]).int()}, ValueError, "number of behaviours, 2; .*last 3"),
        ({"ids": torch.zeros(3, 1).long()}, ValueError, r"ids must have one dimension, .*\(3, 1\)"),
        ({"ids": torch.zeros(3)}, TypeError, "ids must be int32 or int64, got torch.float32"),
        ({"ids": torch.zeros(3).bool()}, TypeError, "ids must be int32 or int64, got torch.bool"),
        ({"ids": torch.zeros(3, device="meta").long()}, ValueError, "values on cpu, ids on meta"),
        ({"values": torch.zeros(0, 8)}, ValueError, "values, which has none, got 3 ids"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_ids_that_cannot_be_right_are_refused(
    operator: str, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    h = draw([2, 1], SMALL, queries=1)
    h = replace(h, **{name: tensor.cpu() for name, tensor in vars(h).items()})
    right = HistoriesById(**vars(h), ids=torch.tensor([2, 0, 2]))
    assert by_id(operator, right).isfinite().all()
    for impl in ("auto", "reference"):
        with pytest.raises(error, match=message):
            by_id(operator, right, **changed, impl=impl)


def test_operators_pass_opcheck() -> None:
    h = draw_by_id(SMALL)
    with Recorder() as recorder:
        for operator in (encode, attend, attend_at, attend_last):
            operator(h, 3, "triton")
        encode(h, 3, "reference")
    names = {func._schema.name.split("::")[1] for func, _ in recorder.calls}
    assert {"sdim_fused_sum_by_item", "sdim_checked_ids"} <= names
    for func, arguments in recorder.calls:
        torch.library.opcheck(func, arguments)


def all_operators(values: Tensor, h: HistoriesById, impl: Impl) -> Tensor:
    """Every operator that takes ids, as a model would glue them."""
    queries, code = h.queries.view(3, -1, h.queries.shape[1]), (h.planes, 3)
    history = (values, h.offsets)
    table = sdim.encode(*history, *code, ids=h.ids, impl=impl)
    at = (h.queries, h.query_offsets, h.cuts)
    return (
        sdim.read(table, queries, *code, impl=impl)
        + sdim.attend(*history, queries, *code, ids=h.ids, impl=impl)
    ).flatten(0, 1) + sdim.attend_at(*history, *at, *code, last=4, ids=h.ids, impl=impl)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_once_without_graph_breaks_forward_and_backward(impl: Impl) -> None:
    function = partial(all_operators, impl=impl)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths, queries, stance in (
        ([2, 5, 17], 5, "default"),
        ([9, 0, 30], 4, "fail_on_recompile"),
    ):
        h = HistoriesById.of_part(draw(lengths, SMALL, queries=queries))
        with torch.compiler.set_stance(stance):
            found = gradient_of(compiled, h)
        if impl == "triton":
            assert_same_bits(found, gradient_of(function, h))
        else:  # on a GPU torch adds in any order
            torch.testing.assert_close(found, gradient_of(function, h), **TOLERANCE[torch.float32])
