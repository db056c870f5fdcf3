"""Exact target attention: the blocked form against the definition, and what any history obeys."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from hashtab.kernels import dense
from hashtab.kernels.dense import blocked
from tests.kernels.histories import Histories, offsets_of
from tests.tolerances import TOLERANCE

LENGTHS = [0, 1, 63, 111, 1000]
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
few = settings(max_examples=25, deadline=None, derandomize=True)


def keys_of(h: Histories) -> Tensor:
    return h.values.roll(1, 0)


def by_loop(h: Histories, last: int | None = None) -> tuple[Tensor, ...]:
    """Interests and gradients of queries, values and keys, one query after the other."""
    leaves = [t.double().requires_grad_() for t in (h.queries, h.values, keys_of(h))]
    queries, values, keys = leaves
    rows = []
    for i, (user, cut) in enumerate(zip(h.user.tolist(), h.cuts.tolist(), strict=True)):
        first = int(h.offsets[user])
        seen = slice(first + (0 if last is None else max(0, cut - last)), first + cut)
        weights = (keys[seen] @ queries[i] / queries.shape[1] ** 0.5).softmax(0)
        rows.append(weights @ values[seen])
    interest = torch.stack(rows)
    return interest.detach(), *torch.autograd.grad(interest, leaves, upstream(interest))


def attend_at(h: Histories, last: int | None, impl: dense.Impl) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in (h.queries, h.values, keys_of(h))]
    queries, values, keys = leaves
    interest = dense.target_attention_at(
        queries, h.query_offsets, h.cuts, values, h.offsets, keys=keys, last=last, impl=impl
    )
    grads = torch.autograd.grad(interest, leaves, upstream(interest).to(interest.dtype))
    return interest.detach(), *grads


def upstream(interest: Tensor) -> Tensor:
    return torch.arange(interest.numel(), dtype=torch.float64).view(interest.shape).cos()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("impl", ["reference", "blocked"])
@dtypes
@pytest.mark.parametrize(("size", "last"), [(24, None), (40, 1), (60, 50), (100, None)])
def test_agrees_with_one_query_after_the_other(
    impl: dense.Impl, dtype: torch.dtype, size: int, last: int | None
) -> None:
    h = Histories.random(LENGTHS, size=size, queries=70, dtype=dtype)
    for found, expected in zip(attend_at(h, last, impl), by_loop(h, last), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    h = Histories.random([200, 0], dtype=dtype)
    for found, expected in zip(attend_at(h, 90, "auto"), by_loop(h, 90), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("last", [None, 2])
def test_gradcheck(impl: dense.Impl, last: int | None) -> None:
    h = Histories.random([4, 0, 3], size=3, queries=3)

    def attend(queries: Tensor, values: Tensor, keys: Tensor) -> Tensor:
        return dense.target_attention_at(
            queries, h.query_offsets, h.cuts, values, h.offsets, keys=keys, last=last, impl=impl
        )

    leaves = [t.requires_grad_() for t in (h.queries, h.values, h.values[:, :3] * 2 + 1)]
    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_keys_are_the_values_and_scale_is_that_of_the_paper_by_default(impl: dense.Impl) -> None:
    h = Histories.random([9, 0], queries=2)
    queries = h.queries.view(2, 2, 8)
    defaults = dense.target_attention(queries, h.values, h.offsets, impl=impl)
    spelt_out = dense.target_attention(
        queries, h.values, h.offsets, keys=h.values, scale=8**-0.5, impl=impl
    )
    assert torch.equal(defaults, spelt_out)
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries[:1], h.values[None], h.values[None]
    )
    torch.testing.assert_close(defaults[:1], expected, **TOLERANCE[torch.float64])


def test_values_may_be_wider_than_keys() -> None:
    h = Histories.random([9, 3])
    wide = torch.cat([h.values, h.values], dim=1)
    interest = dense.target_attention_at(
        h.queries, h.query_offsets, h.cuts, wide, h.offsets, keys=h.values
    )
    narrow = dense.target_attention_at(h.queries, h.query_offsets, h.cuts, h.values, h.offsets)
    torch.testing.assert_close(interest[:, :8], narrow, **TOLERANCE[torch.float64])
    torch.testing.assert_close(interest[:, 8:], narrow, **TOLERANCE[torch.float64])


@few
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.sampled_from(["reference", "blocked"]),
)
def test_an_empty_view_is_zeros_with_zero_gradient(
    lengths: list[int], seed: int, impl: dense.Impl
) -> None:
    h = Histories.random(lengths, seed=seed)
    h.cuts.view(-1, 5)[:, 0] = 0
    blind = h.cuts == 0
    interest, grad_queries, grad_values, grad_keys = attend_at(h, None, impl)
    assert not interest[blind].any()
    assert not grad_queries[blind].any()
    assert grad_values.isfinite().all()
    assert grad_keys.isfinite().all()


@few
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(0, 1000))
def test_batch_mates_and_the_future_change_nothing(lengths: list[int], seed: int) -> None:
    h = Histories.random(lengths, seed=seed)
    together = dense.target_attention_at(h.queries, h.query_offsets, h.cuts, h.values, h.offsets)
    for i, (user, cut) in enumerate(zip(h.user.tolist(), h.cuts.tolist(), strict=True)):
        seen = h.values[int(h.offsets[user]) :][:cut]
        alone = dense.target_attention(h.queries[None, None, i], seen, offsets_of([cut]))
        torch.testing.assert_close(alone[0, 0], together[i], **TOLERANCE[torch.float64])


@pytest.mark.parametrize("last", [None, 3])
def test_blocks_of_any_size_give_the_same(
    last: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = Histories.random([90, 0, 31], queries=40)
    expected = attend_at(h, last, "auto")
    monkeypatch.setattr(blocked, "_FEWEST_QUERIES", 1)
    for scores in (1, 200, 1000):
        monkeypatch.setattr(blocked, "_SCORES_AT_ONCE", scores)
        for a, b in zip(attend_at(h, last, "auto"), expected, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE[torch.float64])


def test_huge_scores_do_not_overflow() -> None:
    h = Histories.random([50], dtype=torch.float32)
    h.queries.mul_(1e4)
    h.values.mul_(1e3)
    interest, *grads = attend_at(h, None, "auto")
    assert interest.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
