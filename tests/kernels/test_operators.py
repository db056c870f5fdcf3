"""The operators as torch sees them: registration, compilation, threads, autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hashtab.kernels import dense, sdim
from hashtab.kernels.core.dispatch import Impl
from tests.kernels.histories import Histories
from tests.tolerances import TOLERANCE

ops = torch.ops.hashtab


def inputs(dtype: torch.dtype = torch.float32) -> Histories:
    return Histories.random([0, 5, 17], size=8, planes=12, queries=3, dtype=dtype)


def check(operator: Any, *arguments: object) -> None:
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdim_operators_pass_opcheck(impl: Impl, dtype: torch.dtype) -> None:
    h, tau = inputs(dtype), 3
    keys = (sdim.codes(h.values, h.planes, tau), sdim.codes(h.queries, h.planes, tau))
    table = sdim.encode(h.values, h.offsets, h.planes, tau)
    candidates = keys[1].view(3, 3, 4)
    check(ops.sdim_codes, h.queries.view(3, 3, 8), h.planes, tau, impl)
    check(ops.sdim_encode, h.values, h.offsets, keys[0], tau, impl)
    check(ops.sdim_encode_backward, table, h.offsets, keys[0], impl)
    check(ops.sdim_read, table, candidates, impl)
    check(ops.sdim_read_backward, torch.ones(3, 3, 8), table, candidates, tau, impl)
    walk = (h.values, h.offsets, *keys, h.query_offsets, h.cuts, tau)
    check(ops.sdim_attend_at, *walk, None, impl)
    check(ops.sdim_attend_at, *walk, 4, impl)
    check(ops.sdim_attend_at_backward, torch.ones(9, 8), *walk, 4, impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_operators_pass_opcheck(dtype: torch.dtype) -> None:
    h = inputs(dtype)
    arguments = (h.queries, h.query_offsets, h.cuts, h.values, h.values, h.offsets, 0.3, 4)
    check(ops.dense_attend_at, *arguments)
    forward = ops.dense_attend_at(*arguments)
    check(ops.dense_attend_at_backward, torch.ones(9, 8), *forward, *arguments)


def interests(h: Histories, values: Tensor) -> Tensor:
    """Every differentiable operator, as a model would glue them."""
    queries = h.queries.view(3, 3, -1)
    table = sdim.encode(values, h.offsets, h.planes, 3)
    return (
        sdim.read(table, queries, h.planes, 3)
        + sdim.attend(values, h.offsets, queries, h.planes, 3)
        + dense.target_attention(queries, values, h.offsets)
    ).flatten(0, 1) + sdim.attend_at(
        values, h.offsets, h.queries, h.query_offsets, h.cuts, h.planes, 3, last=4
    )


def gradient(function: Callable[[Histories, Tensor], Tensor], h: Histories) -> tuple[Tensor, ...]:
    values = h.values.clone().requires_grad_()
    interest = function(h, values)
    return interest.detach(), *torch.autograd.grad(interest.square().sum(), values)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_compiles_without_graph_breaks_forward_and_backward() -> None:
    compiled = torch.compile(interests, fullgraph=True, backend="aot_eager")
    for lengths in ([0, 5, 17], [8, 1, 30]):
        h = Histories.random(lengths, queries=3, dtype=torch.float32)
        torch.testing.assert_close(
            gradient(compiled, h), gradient(interests, h), **TOLERANCE[torch.float32]
        )


def test_the_number_of_threads_changes_no_bit() -> None:
    h = Histories.random([0, 300, 17, 64, 5, 120], planes=20, queries=20, dtype=torch.float32)

    def results() -> tuple[Tensor, ...]:
        def all_operators(h: Histories, values: Tensor) -> Tensor:
            queries = h.queries.view(6, 20, -1)
            table = sdim.encode(values, h.offsets, h.planes, 5)
            read = sdim.read(table, queries, h.planes, 5).flatten(0, 1)
            return read + sdim.attend_at(
                values, h.offsets, h.queries, h.query_offsets, h.cuts, h.planes, 5, last=40
            )

        return gradient(all_operators, h)

    alone = results()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for found, expected in zip(results(), alone, strict=True):
            assert torch.equal(found, expected)


def test_autocast_changes_no_bit() -> None:
    h = inputs()
    expected = gradient(interests, h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradient(interests, h)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_strided_arguments_are_read_right() -> None:
    h = inputs()
    wide = torch.randn(len(h.values), 16)[:, ::2]
    planes = h.planes.t().contiguous().t()
    arguments = (h.offsets, h.queries, h.query_offsets, h.cuts)
    assert torch.equal(
        sdim.attend_at(wide, *arguments, planes, 3),
        sdim.attend_at(wide.contiguous(), *arguments, h.planes, 3),
    )


def test_no_users_no_queries_no_behaviours() -> None:
    nothing, empty = torch.zeros(0, 8, requires_grad=True), torch.tensor([0])
    none = torch.zeros(0, dtype=torch.int64)
    planes = torch.randn(8, 6)
    assert sdim.attend_at(nothing, empty, nothing, empty, none, planes, 3).shape == (0, 8)
    assert dense.target_attention_at(nothing, empty, none, nothing, empty).shape == (0, 8)
    assert sdim.encode(nothing, empty, planes, 3).shape == (0, 2, 8, 8)
    two = torch.tensor([0, 0, 0])
    interest = sdim.attend(nothing, two, torch.randn(2, 3, 8), planes, 3)
    assert interest.shape == (2, 3, 8)
    interest.sum().backward()
    assert sdim.expected(nothing, two, torch.randn(2, 3, 8), 3).shape == (2, 3, 8)
