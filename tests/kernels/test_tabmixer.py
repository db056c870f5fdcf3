"""The TabMixer: its definition by properties, native code against the definition."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hashtab.kernels import tabmixer
from hashtab.kernels.tabmixer import Impl, Weights, reference
from tests.tolerances import TOLERANCE

ops = torch.ops.hashtab
impls = pytest.mark.parametrize("impl", ["reference", "native"])
SEEDS = torch.tensor([1, -(2**62), 2**63 - 1])
# Networks, columns, rows, features, hidden units; usual widths, odd ones, one of everything.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 8, 16),
    (1, 20, 40, 16, 32),
    (3, 7, 33, 10, 12),
    (2, 1, 9, 3, 33),
    (1, 5, 1, 40, 9),
    (2, 2, 70, 24, 7),
]


@dataclass(frozen=True)
class Mixer:
    """Tokens, weights and a rate of dropout."""

    x: Tensor
    weights: Weights
    dropout: float = 0.0

    @classmethod
    def random(
        cls, shape: tuple[int, ...], dropout: float = 0.0, dtype: torch.dtype = torch.float64
    ) -> "Mixer":
        generator = torch.Generator().manual_seed(sum(shape))
        networks, columns, rows, size, hidden = shape

        def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return (shift + scale * drawn).to(dtype)

        one = (networks, 1, 1, size)
        weights = Weights(
            norm_weight=draw(*one, scale=0.2, shift=1),
            norm_bias=draw(*one, scale=0.2),
            columns_in=draw(networks, hidden, columns, scale=columns**-0.5),
            columns_in_bias=draw(networks, hidden, 1),
            columns_out=draw(networks, columns, hidden, scale=hidden**-0.5),
            columns_out_bias=draw(networks, columns, 1),
            features_in=draw(networks, size, hidden, scale=max(size, 1) ** -0.5),
            features_in_bias=draw(networks, 1, hidden),
            features_out=draw(networks, hidden, size, scale=hidden**-0.5),
            features_out_bias=draw(networks, 1, size),
            out_weight=draw(*one, scale=0.2, shift=1),
            out_bias=draw(*one, scale=0.2),
        )
        return cls(draw(networks, columns, rows, size), weights, dropout)

    def mix(self, impl: Impl = "auto", x: Tensor | None = None) -> Tensor:
        tokens = self.x if x is None else x
        return tabmixer.tab_mixer(
            tokens, self.weights, dropout=self.dropout, seeds=SEEDS, impl=impl
        )

    def with_gradients(self, impl: Impl) -> list[Tensor]:
        x = self.x.clone().requires_grad_()
        weights = Weights(*(weight.clone().requires_grad_() for weight in self.weights))
        out = replace(self, weights=weights).mix(impl, x)
        generator = torch.Generator().manual_seed(7)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        return [out.detach(), *torch.autograd.grad(out, (x, *weights), grad)]


def close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Hold results against the definition in float64; sums over rows err by the sum's size."""
    for a, b in zip(found, expected, strict=True):
        limit = TOLERANCE[dtype]
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(
            a.double(), b, rtol=limit["rtol"], atol=4 * limit["atol"] * scale
        )


def test_the_definition_is_the_paper_s_formula() -> None:
    m = Mixer.random((1, 4, 6, 8, 5))
    w, x = m.weights, m.x[0]  # [T, R, D]

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], weight.flatten(), bias.flatten())

    y = norm(x, w.norm_weight, w.norm_bias)
    hidden = torch.einsum("ht,trd->hrd", w.columns_in[0], y) + w.columns_in_bias[0, :, :, None]
    columns = torch.einsum("th,hrd->trd", w.columns_out[0], hidden.relu())
    columns = columns + w.columns_out_bias[0, :, :, None]
    features = (y @ w.features_in[0] + w.features_in_bias[0]).relu()
    features = features @ w.features_out[0] + w.features_out_bias[0]
    expected = norm(features * functional.gelu(columns), w.out_weight, w.out_bias)
    expected = expected * expected.sigmoid()
    torch.testing.assert_close(m.mix("reference")[0], expected, **TOLERANCE[torch.float64])


@impls
def test_gradients_are_right(impl: Impl) -> None:
    m = Mixer.random((2, 3, 2, 4, 3), dropout=0.25)
    arguments = [tensor.requires_grad_() for tensor in (m.x, *m.weights)]

    def mixed(x: Tensor, *weights: Tensor) -> Tensor:
        return replace(m, weights=Weights(*weights)).mix(impl, x)

    assert torch.autograd.gradcheck(mixed, arguments)


@pytest.mark.parametrize("dropout", [0.0, 0.15, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_native_is_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, dropout: float
) -> None:
    m = Mixer.random(shape, dropout, dtype)
    double = Mixer(m.x.double(), Weights(*(weight.double() for weight in m.weights)), dropout)
    close(m.with_gradients("native"), double.with_gradients("reference"), dtype)


@impls
def test_rows_and_networks_have_nothing_to_do_with_each_other(impl: Impl) -> None:
    m = Mixer.random((3, 5, 40, 8, 6))
    whole = m.mix(impl)
    one = Mixer(m.x[1:2, :, 17:18], Weights(*(weight[1:2] for weight in m.weights)))
    torch.testing.assert_close(one.mix(impl), whole[1:2, :, 17:18], **TOLERANCE[torch.float64])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_result_alone_as_among_others(shape: tuple[int, ...]) -> None:
    m = Mixer.random(shape, dtype=torch.float32)
    whole = m.mix("native")
    for r in range(shape[2]):
        assert torch.equal(m.mix("native", m.x[:, :, r : r + 1]), whole[:, :, r : r + 1])


def test_columns_far_from_zero_are_gated_as_the_normal_distribution_says() -> None:
    m = Mixer.random((1, 1, 1, 2, 1), dtype=torch.float32)
    for bias in (-30.0, -9.0, -5.0, -2.0, 0.0, 2.0, 9.0, 30.0):
        zero = torch.zeros_like
        weights = m.weights._replace(
            columns_out=zero(m.weights.columns_out),
            columns_out_bias=torch.full_like(m.weights.columns_out_bias, bias),
            features_out=zero(m.weights.features_out),
            features_out_bias=torch.tensor([[[1e4, -1e4]]]),
        )
        gate = functional.gelu(torch.tensor(bias, dtype=torch.float64))
        joined = torch.tensor([[[[1e4, -1e4]]]]).double() * gate
        one, two = weights.out_weight.double(), weights.out_bias.double()
        expected = functional.silu(reference.layer_norm(joined, one, two))
        found = replace(m, weights=weights).mix("native")
        torch.testing.assert_close(found.double(), expected, **TOLERANCE[torch.float32])


@impls
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_row(impl: Impl, value: float) -> None:
    m = Mixer.random((2, 3, 20, 8, 6), dropout=0.25, dtype=torch.float32)
    clean, x = m.mix(impl), m.x.clone()
    x[1, 2, 11, 3] = value
    found = m.mix(impl, x)
    assert found[1, :, 11].isnan().all()
    found[1, :, 11] = clean[1, :, 11]
    assert torch.equal(found, clean)


@impls
def test_dropout_drops_its_share_and_keeps_the_mean(impl: Impl) -> None:
    m = Mixer.random((1, 10, 400, 8, 16))
    # Nothing of the hidden units reaches a result that its layer norm does not weigh.
    silent = m.weights._replace(out_weight=torch.zeros_like(m.weights.out_weight))
    silent = silent._replace(out_bias=torch.ones_like(m.weights.out_bias))
    out = replace(m, weights=silent, dropout=0.25).mix(impl)
    kept = functional.silu(torch.tensor(1.0, dtype=torch.float64)) / 0.75
    expected = torch.stack([torch.zeros_like(kept), kept])
    torch.testing.assert_close(out.unique(), expected)
    assert float((out == 0).double().mean()) == pytest.approx(0.25, abs=0.01)


def test_random_bytes_are_those_of_splitmix64() -> None:
    words = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of seed 0, from word 1
    drawn = reference.random_bytes(torch.tensor(0), 32, torch.device("cpu"))
    expected = torch.tensor([word - 2**64 if word >= 2**63 else word for word in words])
    assert torch.equal(drawn[8:], expected.view(torch.uint8))


def test_torch_s_seed_says_what_is_dropped() -> None:
    m = Mixer.random((1, 3, 10, 8, 4))

    def mixed(seed: int, impl: Impl) -> Tensor:
        torch.manual_seed(seed)
        return tabmixer.tab_mixer(m.x, m.weights, dropout=0.5, impl=impl)

    assert torch.equal(mixed(1, "native"), mixed(1, "native"))
    assert not torch.equal(mixed(1, "native"), mixed(2, "native"))
    torch.testing.assert_close(mixed(1, "native"), mixed(1, "reference"))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_layer_norm_is_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, by_row: bool
) -> None:
    m = Mixer.random(shape, dtype=dtype)

    def results(dtype: torch.dtype, impl: Impl) -> list[Tensor]:
        tensors = (m.x, m.weights.norm_weight, m.weights.norm_bias)
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
        out = tabmixer.layer_norm(inputs[0], inputs[1], inputs[2], by_row=by_row, impl=impl)
        generator = torch.Generator().manual_seed(7)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    expected = results(torch.float64, "reference")
    plain = reference.layer_norm(m.x.double(), *(w.double() for w in m.weights[:2]))
    torch.testing.assert_close(expected[0], plain.transpose(1, 2) if by_row else plain)
    close(results(dtype, "native"), expected, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("outputs", [1, 8, 16, 37])
@pytest.mark.parametrize("rows", [0, 1, 4, 9])
def test_native_linear_is_the_definition_row_by_row(
    rows: int, outputs: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows + outputs)
    shapes = ((3, rows, 21), (3, 21, outputs), (3, 1, outputs))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    found = tabmixer.linear(x, weight, bias, impl="native")
    expected = torch.baddbmm(bias.double(), x.double(), weight.double())
    assert found.shape == expected.shape
    if rows:
        close([found], [expected], dtype)
    for r in range(rows):
        alone = tabmixer.linear(x[:, r : r + 1], weight, bias, impl="native")
        assert torch.equal(alone, found[:, r : r + 1])


def test_linear_with_a_gradient_is_the_definition() -> None:
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(2, 4, 5), torch.randn(2, 1, 5)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(tabmixer.linear, [part.double() for part in (x, weight, bias)])
    with torch.autocast("cpu", torch.bfloat16):
        assert tabmixer.linear(x, weight, bias).dtype == torch.float32
    with pytest.raises(RuntimeError, match="no gradient"):
        tabmixer.linear(x, weight, bias, impl="native")
    with pytest.raises(ValueError, match=r"bias must be \(2, 1, 5\)"):
        tabmixer.linear(x, weight, bias[:, :, :4])


def test_frozen_weights_get_no_gradient_and_tokens_the_same() -> None:
    m = Mixer.random((2, 5, 20, 8, 6), dropout=0.25)
    x = m.x.clone().requires_grad_()
    out = m.mix("native", x)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(found, m.with_gradients("native")[1])


def test_the_number_of_threads_changes_no_bit() -> None:
    m = Mixer.random((3, 5, 100, 8, 6), dropout=0.25, dtype=torch.float32)
    alone = m.with_gradients("native")
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for found, expected in zip(m.with_gradients("native"), alone, strict=True):
            assert torch.equal(found, expected)


@impls
def test_strided_arguments_are_read_right(impl: Impl) -> None:
    m = Mixer.random((2, 3, 6, 8, 4), dropout=0.25)
    matrix = torch.cat([weight.flatten(1) for weight in m.weights], 1)
    sizes = [weight[0].numel() for weight in m.weights]
    parts = zip(matrix.split(sizes, 1), m.weights, strict=True)
    views = Weights(*(part.unflatten(1, like.shape[1:]) for part, like in parts))
    strided = Mixer(m.x.mT.contiguous().mT, views, m.dropout)
    torch.testing.assert_close(strided.mix(impl), m.mix(impl), **TOLERANCE[torch.float64])


def test_operators_pass_opcheck() -> None:
    m = Mixer.random((2, 3, 6, 8, 4), dtype=torch.float32)
    flat = torch.cat([weight.flatten(1) for weight in m.weights], 1)
    norm = (m.x, m.weights.norm_weight, True)
    for operator, arguments in (
        (ops.tab_mixer, (m.x, flat, SEEDS, 4, 64)),
        (ops.tab_mixer, (m.x, flat, None, 4, 0)),
        (ops.tab_mixer_backward, (m.x, m.x, flat, SEEDS, 4, 64, True)),
        (ops.layer_norm, (m.x, m.weights.norm_weight, m.weights.norm_bias, True)),
        (ops.layer_norm_backward, (m.x.transpose(1, 2).contiguous(), *norm)),
        (ops.stacked_linear, (m.x[:, 0], m.weights.features_in, m.weights.features_in_bias)),
    ):
        torch.library.opcheck(operator, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_compiles_without_graph_breaks() -> None:
    m = Mixer.random((2, 3, 6, 8, 4), dtype=torch.float32)
    weights = [weight.requires_grad_() for weight in m.weights]

    def mixed(x: Tensor) -> Tensor:
        y = tabmixer.layer_norm(x, m.weights.norm_weight, m.weights.norm_bias, by_row=True)
        return tabmixer.tab_mixer(y.transpose(1, 2), m.weights).square().sum()

    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(m.x), weights)
    torch.testing.assert_close(found, torch.autograd.grad(mixed(m.x), weights))


def test_exports_as_the_definition() -> None:
    m = Mixer.random((2, 3, 6, 8, 4), dtype=torch.float32)

    class Mix(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return tabmixer.tab_mixer(x, m.weights)

    rows = {2: torch.export.Dim("rows")}
    program = torch.export.export(Mix(), (m.x,), dynamic_shapes=(rows,))
    assert "hashtab" not in str(program.graph)
    x = Mixer.random((2, 3, 11, 8, 4), dtype=torch.float32).x
    torch.testing.assert_close(program.module()(x), m.mix(x=x), **TOLERANCE[torch.float32])


@impls
def test_autocast_changes_no_bit(impl: Impl) -> None:
    m = Mixer.random((2, 3, 6, 8, 4), dtype=torch.float32)
    expected = m.mix(impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(m.mix(impl), expected)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    m = Mixer.random((1, 2, 3, 4, 5))
    x = m.x.requires_grad_()
    (grad,) = torch.autograd.grad(m.mix("native").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_half_precision_takes_the_definition() -> None:
    m = Mixer.random((1, 2, 3, 4, 5), dtype=torch.bfloat16)
    assert torch.equal(m.mix(), m.mix("reference"))
    with pytest.raises(RuntimeError, match=r"float32 and float64, not torch\.bfloat16"):
        m.mix("native")


BAD = Mixer.random((2, 3, 4, 8, 5))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": BAD.x[0]}, ValueError, r"x must be \[S, T, R, D\], got \(3, 4, 8\)"),
        ({"x": BAD.x.long()}, TypeError, "x must be floating point"),
        ({"x": BAD.x.float()}, TypeError, "norm_weight must have the dtype of x"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got dropout=1.0"),
        ({"dropout": 0.5, "seeds": SEEDS[:2]}, ValueError, r"seeds must be \[3\] int64"),
        ({"impl": "fast"}, ValueError, r"impl must be one of .*got impl='fast'"),
        (
            {"weights": BAD.weights._replace(columns_out=BAD.weights.columns_in)},
            ValueError,
            r"columns_out must be \(2, 3, 5\) for this x, got \(2, 5, 3\)",
        ),
    ],
)
def test_bad_arguments_are_named(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"x": BAD.x, "weights": BAD.weights} | changed
    with pytest.raises(error, match=message):
        tabmixer.tab_mixer(**arguments)


def test_no_features() -> None:
    m = Mixer.random((1, 2, 3, 0, 5))
    assert m.mix("native", m.x).shape == (1, 2, 3, 0)


def test_no_rows() -> None:
    m = Mixer.random((2, 3, 4, 8, 5))
    x = m.x[:, :, :0].requires_grad_()
    out = m.mix("native", x)
    assert out.shape == (2, 3, 0, 8)
    out.sum().backward()
