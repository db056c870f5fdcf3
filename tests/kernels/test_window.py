"""Attention in a sliding window: the blocked form against the definition and against one loop."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from hashtab.kernels import dense
from tests.tolerances import TOLERANCE

impls = pytest.mark.parametrize("impl", ["reference", "blocked"])
few = settings(max_examples=40, deadline=None, derandomize=True)


def tensors(
    length: int, *, size: int = 8, wide: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of 2 sequences and 3 heads."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, length, 3, d, dtype=torch.float64, generator=generator).to(dtype)
        for d in (size, size, wide)
    )
    return q, k, v


def by_loop(
    q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool, lengths: list[int]
) -> Tensor:
    """One query after the other, by the words of the docstring."""
    rows = torch.zeros(v.shape, dtype=torch.float64)
    for b, length in enumerate(lengths):
        for t in range(length):
            seen = slice(max(0, t - window + 1), t + 1 if causal else min(length, t + window))
            scores = torch.einsum("hd,shd->hs", q[b, t].double(), k[b, seen].double())
            weights = (scores / q.shape[3] ** 0.5).softmax(1)
            rows[b, t] = torch.einsum("hs,shd->hd", weights, v[b, seen].double())
    return rows


def upstream(out: Tensor) -> Tensor:
    return torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos().to(out.dtype)


def with_gradients(inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = dense.window_attention(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream(out))


@pytest.mark.usefixtures("poisoned_memory")
@impls
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "window"), [(1, 1), (63, 5), (111, 64), (150, 1000)])
def test_agrees_with_one_query_after_the_other(
    impl: dense.Impl, causal: bool, length: int, window: int
) -> None:
    q, k, v = tensors(length, wide=12)
    lengths = [length, length // 2]
    out = dense.window_attention(
        q, k, v, window=window, causal=causal, lengths=torch.tensor(lengths), impl=impl
    )
    expected = by_loop(q, k, v, window, causal, lengths)
    torch.testing.assert_close(out, expected, **TOLERANCE[torch.float64])


@few
@given(
    length=st.integers(1, 200),
    window=st.integers(1, 220),
    causal=st.booleans(),
    valid=st.none() | st.tuples(st.integers(0, 200), st.integers(0, 200)),
)
def test_blocks_give_the_definition_and_its_gradients(
    length: int, window: int, causal: bool, valid: tuple[int, int] | None
) -> None:
    lengths = None if valid is None else torch.tensor(valid).clamp(max=length)
    options: dict[str, Any] = {"window": window, "causal": causal, "lengths": lengths}
    inputs = tensors(length, size=4, wide=4)
    blocked = with_gradients(inputs, **options, impl="blocked")
    reference = with_gradients(inputs, **options, impl="reference")
    torch.testing.assert_close(blocked, reference, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = tensors(100, dtype=dtype)
    out = dense.window_attention(q, k, v, window=30, causal=True)
    assert out.dtype == dtype
    expected = by_loop(q, k, v, 30, True, [100, 100])
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_over_all_is_dense_attention(causal: bool) -> None:
    q, k, v = tensors(70)
    out = dense.window_attention(q, k, v, window=70, causal=causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(out, expected.transpose(1, 2), **TOLERANCE[torch.float64])


@impls
def test_padding_changes_nothing_and_has_no_gradient(impl: dense.Impl) -> None:
    inputs = tensors(20)
    lengths = torch.tensor([20, 7])
    options: dict[str, Any] = {"window": 6, "causal": False, "lengths": lengths, "impl": impl}
    out, *grads = with_gradients(inputs, **options)
    assert not out[1, 7:].any()
    assert not any(grad[1, 7:].any() for grad in grads)
    other = [x.index_fill(1, torch.tensor([18, 19]), 99.0) for x in inputs]
    mixed = tuple(torch.stack([x[0], y[1]]) for x, y in zip(inputs, other, strict=True))
    torch.testing.assert_close(with_gradients(mixed, **options), (out, *grads), rtol=0, atol=0)


@impls
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(impl: dense.Impl, causal: bool) -> None:
    lengths = torch.tensor([5, 3])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense.window_attention(q, k, v, window=2, causal=causal, lengths=lengths, impl=impl)

    leaves = [x[:, :, :1].requires_grad_() for x in tensors(5, size=3, wide=2)]
    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 4])], ids=["whole", "padded"])
def test_operators_pass_opcheck(dtype: torch.dtype, lengths: Tensor | None) -> None:
    ops = torch.ops.hashtab
    q, k, v = tensors(9, dtype=dtype)
    strided = k.transpose(1, 3).contiguous().transpose(1, 3)
    arguments = (q, strided, v, 4, True, lengths, 0.3)
    torch.library.opcheck(ops.dense_window, arguments)
    forward = ops.dense_window(*arguments)
    grad = torch.ones_like(forward[0])
    torch.library.opcheck(ops.dense_window_backward, (grad, *forward, *arguments))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_compiles_without_graph_breaks_also_as_self_attention() -> None:
    def attend(x: Tensor) -> Tensor:
        return dense.window_attention(x, x, x, window=3, causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    x = tensors(12, dtype=torch.float32)[0]
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    compiled(found).square().sum().backward()
    attend(expected).square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window": 0}, "window must be at least 1, got window=0"),
        ({"k": torch.zeros(2, 4, 3, 8)}, "agree in B, T and H"),
        ({"k": torch.zeros(2, 5, 3, 7)}, "with D = 8"),
        ({"lengths": torch.tensor([6, 1])}, r"within 0 .. 5, got \[6\]"),
        ({"lengths": torch.tensor([1])}, r"lengths must be \[B\] for B = 2"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_wrong_values(changed: dict[str, Any], message: str) -> None:
    q, k, v = tensors(5)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "window": 2, "causal": True}
    with pytest.raises(ValueError, match=message):
        dense.window_attention(**(arguments | changed))
