"""The operators as torch sees them: registration, compilation, threads, autocast."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hashtab.kernels import dense, sdim
from hashtab.kernels.core.dispatch import Impl
from hashtab.kernels.core.library import register
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
    check(ops.sdim_read_backward, torch.ones(3, 3, 8), table, candidates, impl)
    walk = (h.values, h.offsets, *keys, h.query_offsets, h.cuts, tau)
    check(ops.sdim_attend_at, *walk, None, impl)
    check(ops.sdim_attend_at, *walk, 4, impl)
    check(ops.sdim_attend_at_backward, torch.ones(9, 8), *walk, 4, impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_operators_pass_opcheck(dtype: torch.dtype) -> None:
    h = inputs(dtype)
    strided = h.values.t().contiguous().t()
    arguments = (h.queries, h.query_offsets, h.cuts, strided, h.values, h.offsets, 0.3, 4)
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
        + dense.target_attention(queries, values, h.offsets, keys=values)
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


def test_exports_with_a_dynamic_number_of_behaviours_and_queries() -> None:
    class Interests(torch.nn.Module):
        def forward(
            self,
            values: Tensor,
            offsets: Tensor,
            queries: Tensor,
            query_offsets: Tensor,
            cuts: Tensor,
        ) -> Tensor:
            walked = sdim.attend_at(values, offsets, queries, query_offsets, cuts, planes, 3)
            return walked + dense.target_attention_at(queries, query_offsets, cuts, values, offsets)

    def arguments(h: Histories) -> tuple[Tensor, ...]:
        return h.values, h.offsets, h.queries, h.query_offsets, h.cuts

    first = Histories.random([4, 5, 17], queries=3, dtype=torch.float32)
    other = Histories.random([0, 60, 7], queries=5, dtype=torch.float32)
    planes = first.planes
    n, q = torch.export.Dim("n"), torch.export.Dim("q")
    shapes = ({0: n}, None, {0: q}, None, {0: q})
    program = torch.export.export(Interests(), arguments(first), dynamic_shapes=shapes)
    found = program.module()(*arguments(other))
    assert torch.equal(found, Interests()(*arguments(other)))


@pytest.mark.parametrize("name", ["encode", "attend", "attend_at", "target_attention_at"])
def test_a_second_derivative_is_refused_rather_than_wrong(name: str) -> None:
    h = inputs(torch.float64)
    values = h.values.requires_grad_()
    asked = (h.queries, h.query_offsets, h.cuts)
    interest = {
        "encode": lambda: sdim.encode(values, h.offsets, h.planes, 3),
        "attend": lambda: sdim.attend(values, h.offsets, h.queries.view(3, 3, 8), h.planes, 3),
        "attend_at": lambda: sdim.attend_at(values, h.offsets, *asked, h.planes, 3),
        "target_attention_at": lambda: dense.target_attention_at(*asked, values, h.offsets),
    }[name]()
    (grad,) = torch.autograd.grad(interest.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_operators_called_directly_refuse_codes_that_are_no_addresses() -> None:
    h = inputs()
    keys = sdim.codes(h.values, h.planes, 3)
    for wrong, message in (
        (keys + 8, r"codes must lie within \[0, 8\)"),
        (keys - 8, r"codes must lie within \[0, 8\)"),
        (keys[:3], r"codes must be of shape \(22, 4\), got \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.sdim_encode(h.values, h.offsets, wrong, 3, "native")
    with pytest.raises(TypeError, match=r"codes must be int32, got torch\.int64"):
        ops.sdim_encode(h.values, h.offsets, keys.long(), 3, "native")
    table = sdim.encode(h.values, h.offsets, h.planes, 3)
    candidates = sdim.codes(h.queries, h.planes, 3).view(3, 3, 4)
    with pytest.raises(ValueError, match=r"grad must be of shape \(3, 3, 8\), got \(3, 2, 8\)"):
        ops.sdim_read_backward(torch.ones(3, 2, 8), table, candidates, "native")


def test_kernels_are_launched_on_the_gpu_of_the_first_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current = [torch.device("cuda", 0)]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    registered: dict[str, Callable[..., object]] = {}
    monkeypatch.setattr(torch.library, "define", lambda *_, **__: None)
    monkeypatch.setattr(torch.library, "register_fake", lambda *_: None)
    monkeypatch.setattr(torch.library, "impl", lambda _, kind, f: registered.update({kind: f}))
    register("where", "(Tensor x, int y) -> Tensor", lambda _, y: (current[-1], y), lambda *_: None)
    other = torch.device("cuda", 1)
    assert registered["cuda"](SimpleNamespace(device=other), 3) == (other, 3)
    assert current == [torch.device("cuda", 0)]


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
