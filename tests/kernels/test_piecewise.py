"""Piecewise linear embeddings: the definition by properties, native code against it."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hashtab.kernels import piecewise
from hashtab.kernels.piecewise import Impl
from tests.tolerances import TOLERANCE

ops = torch.ops.hashtab
impls = pytest.mark.parametrize("impl", ["reference", "native"])
# Networks, networks that numbers are given for, columns, rows, bins, features.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 2, 3, 5, 8, 16),
    (3, 1, 4, 33, 5, 7),
    (2, 1, 2, 9, 128, 32),
    (2, 2, 3, 7, 0, 4),
    (2, 1, 0, 7, 4, 4),
    (2, 2, 3, 0, 4, 4),
]


class Numbers(NamedTuple):
    """Arguments of `embed`."""

    linear: Tensor
    place: Tensor
    missing: Tensor
    weight: Tensor

    @classmethod
    def random(cls, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> "Numbers":
        networks, given, columns, rows, bins, size = shape
        generator = torch.Generator().manual_seed(sum(shape))

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        place = (bins / 2 + bins * draw(given, columns, rows)).clamp(-1, bins + 1)
        place[..., ::3] = place[..., ::3].round()  # ends of bins
        missing = draw(given, columns, rows) > 1
        weight = draw(networks, columns, bins + 2, size)
        return cls(draw(given, columns, rows), place, missing, weight)

    def embed(self, impl: Impl) -> Tensor:
        return piecewise.embed(*self, impl=impl)

    def with_gradient(self, impl: Impl) -> list[Tensor]:
        weight = self.weight.clone().requires_grad_()
        out = self._replace(weight=weight).embed(impl)
        generator = torch.Generator().manual_seed(7)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        return [out.detach(), *torch.autograd.grad(out, weight, grad)]


@impls
def test_it_is_the_formula(impl: Impl) -> None:
    weight = torch.tensor([[[[1.0], [10], [100], [0.5], [7]]]])  # three bins, linear, missing
    place = torch.tensor([[[-1.0, 0, 0.25, 1, 1.5, 3, 9]]])
    linear, missing = torch.zeros_like(place), torch.zeros_like(place, dtype=torch.bool)
    linear[..., 1], missing[..., 2] = 2, True
    found = piecewise.embed(linear, place, missing, weight, impl=impl).flatten()
    assert found.tolist() == [0, 2 * 0.5, 0.25 + 7, 1, 1 + 5, 111, 111]


@impls
def test_gradients_are_right(impl: Impl) -> None:
    n = Numbers.random((2, 1, 3, 6, 4, 3))
    weight = n.weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: n._replace(weight=w).embed(impl), weight)


def test_numbers_have_gradients_by_the_definition() -> None:
    n = Numbers.random((2, 2, 3, 6, 4, 3))
    within = (0.3 + n.place.floor()).requires_grad_()  # away from the ends of bins
    linear = n.linear.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, p: piecewise.embed(z, p, n.missing, n.weight), (linear, within)
    )
    with pytest.raises(RuntimeError, match="no gradient of linear and place"):
        n.embed("native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_native_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n = Numbers.random(shape, dtype)
    exact = Numbers(n.linear.double(), n.place.double(), n.missing, n.weight.double())
    pairs = zip(n.with_gradient("native"), exact.with_gradient("reference"), strict=True)
    for found, expected in pairs:
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(
            found.double(), expected, rtol=limit["rtol"], atol=4 * limit["atol"] * scale
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_is_the_same_alone_as_among_others(shape: tuple[int, ...]) -> None:
    n = Numbers.random(shape, torch.float32)
    whole = n.embed("native")
    for r in range(shape[3]):
        linear, place, missing = (part[..., r : r + 1] for part in n[:3])
        one = Numbers(linear, place, missing, n.weight)
        assert torch.equal(one.embed("native"), whole[:, :, r : r + 1])


def test_the_number_of_threads_changes_no_bit() -> None:
    n = Numbers.random((3, 1, 5, 100, 8, 6), torch.float32)
    alone = n.with_gradient("native")
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for found, expected in zip(n.with_gradient("native"), alone, strict=True):
            assert torch.equal(found, expected)


@impls
def test_what_is_no_number_stays_in_its_row(impl: Impl) -> None:
    n = Numbers.random((2, 2, 3, 9, 4, 5), torch.float32)
    clean, place = n.embed(impl), n.place.clone()
    place[1, 2, 4] = torch.nan
    found = n._replace(place=place).embed(impl)
    assert found[1, 2, 4].isnan().all()
    found[1, 2, 4] = clean[1, 2, 4]
    assert torch.equal(found, clean)


@impls
def test_strided_arguments_are_read_right(impl: Impl) -> None:
    n = Numbers.random((2, 2, 3, 6, 4, 5))
    linear, place, missing, weight = (part.mT.contiguous().mT for part in n)
    strided = Numbers(linear, place, missing, weight)
    torch.testing.assert_close(strided.embed(impl), n.embed(impl), **TOLERANCE[torch.float64])


def test_half_precision_runs_by_the_definition() -> None:
    n = Numbers.random((2, 1, 3, 6, 4, 5), torch.bfloat16)
    assert n.embed("auto").dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"for float32 and float64, not torch\.bfloat16"):
        n.embed("native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operators_are_registered_right(dtype: torch.dtype) -> None:
    n = Numbers.random((3, 1, 4, 6, 5, 7), dtype)
    torch.library.opcheck(ops.piecewise_embed, tuple(n))
    grad = torch.randn(3, 4, 6, 7, dtype=dtype)
    torch.library.opcheck(ops.piecewise_embed_backward, (grad, *n[:3], 5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_it_compiles_whole_with_its_gradient() -> None:
    n = Numbers.random((2, 1, 3, 6, 4, 5), torch.float32)
    weight = n.weight.requires_grad_()

    def total(linear: Tensor) -> Tensor:
        return piecewise.embed(linear, n.place, n.missing, weight).square().sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(n.linear), weight)
    torch.testing.assert_close(found, torch.autograd.grad(total(n.linear), weight))


def test_it_exports_as_its_definition() -> None:
    n = Numbers.random((2, 1, 3, 6, 4, 5), torch.float32)

    class Embed(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return piecewise.embed(*arguments)

    graph = torch.export.export(Embed(), tuple(n)).graph
    assert not [node for node in graph.nodes if "hashtab" in str(node.target)]


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"impl": "triton"}, ValueError, "impl must be one of"),
        ({"weight": torch.zeros(2, 3, 1, 5)}, ValueError, r"weight must be \[S, F, K \+ 2, D\]"),
        ({"weight": torch.zeros(3, 3, 6, 5)}, ValueError, r"place must be \[S, F, B\] or"),
        ({"weight": torch.zeros(2, 4, 6, 5)}, ValueError, r"place must be \[S, F, B\] or"),
        ({"place": torch.zeros(3, 6)}, ValueError, r"place must be \[S, F, B\], got \(3, 6\)"),
        ({"linear": torch.zeros(2, 3, 5)}, ValueError, "linear must be of the shape of place"),
        ({"linear": torch.zeros(2, 3, 6).double()}, TypeError, "linear must be torch.float32"),
        ({"missing": torch.zeros(2, 3, 6)}, TypeError, "missing must be torch.bool"),
    ],
)
def test_bad_arguments_say_what_is_wrong(
    changed: dict[str, Any], error: type[Exception], says: str
) -> None:
    good = Numbers.random((2, 2, 3, 6, 4, 5), torch.float32)._asdict()
    with pytest.raises(error, match=says):
        piecewise.embed(**good | changed)
