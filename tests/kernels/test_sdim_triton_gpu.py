"""What only a GPU shows of SDIM's Triton kernels: sizes beyond 32 bits, streams, CUDA graphs."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from hashtab.kernels import sdim
from tests.kernels import fused
from tests.kernels.fused import (
    DEVICE,
    GPU,
    OPERATORS,
    Case,
    Operator,
    assert_accurate,
    assert_same_bits,
    attend,
    attend_at,
    candidates,
    draw,
    encode,
    of_user,
    only,
    read,
)
from tests.kernels.histories import Histories, HistoriesById, offsets_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA device")]

CASE = Case(torch.bfloat16, 64, 3, 16)
QUERIES = 70

# The table that `read` starts with is the definition's, which waits for the device.
operators = pytest.mark.parametrize(
    "operator", [f for f in OPERATORS if f is not read], ids=lambda f: f.__name__
)


by_id = pytest.mark.parametrize("ids", [None, torch.int64, torch.int32], ids=str)


def in_form(h: Histories, ids: torch.dtype | None, seed: int = 0) -> Histories:
    """Return behaviours as they are, or drawn by ids of a dtype."""
    return h if ids is None else HistoriesById.of_part(h, ids, seed)


@operators
def test_another_stream_gives_the_same_bits(operator: Operator) -> None:
    h = draw([300, 0, 5000], CASE, queries=QUERIES)
    expected = operator(h, 3, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on the default stream would be too early
        moved = replace(h, values=h.values * 1)
        found = operator(moved, 3, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("last", [250, 900, 3000])  # walks, as it is not below 200
@by_id
def test_a_walk_over_the_latest_agrees_with_the_definition(
    last: int, ids: torch.dtype | None
) -> None:
    h = in_form(draw([300, 0, 5000, 2049], CASE, queries=QUERIES), ids)
    assert_accurate(h, 3, partial(attend_at, last=last))


@operators
@pytest.mark.parametrize("tau", [3, 8])
@by_id
def test_a_graph_replays_forward_and_backward_on_other_data(
    operator: Operator, tau: int, ids: torch.dtype | None
) -> None:
    case = CASE._replace(tau=tau)
    h = in_form(draw([300, 0, 5000], case, queries=QUERIES), ids)
    other = in_form(draw([5100, 190, 10], case, queries=QUERIES, seed=1), ids, 1)
    operator(h, tau, "triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(h, tau, "triton")
    for name, tensor in vars(other).items():
        getattr(h, name).copy_(tensor)
    graph.replay()
    assert_same_bits(captured, operator(other, tau, "triton"))


@operators
@pytest.mark.parametrize("tau", [3, 8])
def test_behaviours_beyond_two_to_the_31_numbers(
    operator: Operator, tau: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "upstream", fused.same_for_users(3))
    near = draw([9000], CASE._replace(tau=tau, groups=4), queries=3)
    before = 36_000_000 - 9000
    values = near.values.new_zeros(36_000_000, 64)
    values[before:] = near.values
    h = replace(
        near,
        values=values,
        offsets=offsets_of([before, 9000]).to(DEVICE),
        queries=near.queries.repeat(2, 1),
        query_offsets=offsets_of([3, 3]).to(DEVICE),
        cuts=torch.tensor([1, before // 2, before, 1, 4000, 9000], device=DEVICE),
    )
    found = of_user(h, 1, operator(h, tau, "triton"))
    assert_same_bits(found, operator(only(h, 1), tau, "triton"))


@operators
@pytest.mark.parametrize("tau", [3, 8])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
def test_rows_by_id_beyond_two_to_the_31_numbers(
    operator: Operator, tau: int, ids: torch.dtype
) -> None:
    near = HistoriesById.of_part(draw([900, 0, 70], CASE._replace(tau=tau), queries=3), ids)
    before = 36_000_000
    far = near.values.new_zeros(before + len(near.values), 64)
    far[before:] = near.values
    result, grad = operator(replace(near, values=far, ids=near.ids + before), tau, "triton")
    assert_same_bits([result, grad[before:]], operator(near, tau, "triton"))
    assert not grad[:before].any()


def test_tables_beyond_two_to_the_31_numbers() -> None:
    users = 2**31 // (8 * 2**10 * 64) + 50
    h = draw([3] * users, Case(torch.bfloat16, 64, 10, 8), queries=2)
    own = only(h, users - 1)
    code = (h.planes, 10)

    def tables(h: Histories) -> list[torch.Tensor]:
        values = h.values.requires_grad_()
        table = sdim.encode(values, h.offsets, *code, impl="triton")
        interest = sdim.read(table, candidates(h), *code, impl="triton")
        (grad,) = torch.autograd.grad(interest.square().sum(), values)
        return [interest.detach()[-1], grad[-3:]]

    assert_same_bits(tables(h), tables(own))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
@pytest.mark.parametrize("operator", [encode, attend, attend_at])
@by_id
def test_nothing_waits_for_the_device(operator: Operator, ids: torch.dtype | None) -> None:
    h = in_form(draw([300, 0, 700], CASE, queries=QUERIES), ids)
    expected = operator(h, 3, "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = operator(h, 3, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(found, expected)


def test_on_a_gpu_auto_is_triton_where_it_can_run_and_the_interpreter_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h = draw([300, 0, 700], CASE, queries=QUERIES)
    assert_same_bits(attend_at(h, 3, "auto"), attend_at(h, 3, "triton"))
    exact = replace(h, values=h.values.double())
    assert_same_bits(attend_at(exact, 3, "auto"), attend_at(exact, 3, "reference"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="the interpreter takes CPU tensors"):
        encode(h, 3, "triton")
