"""What holds for any history: SDIM's sums add up, and nobody else's rows matter."""

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

from hashtab.kernels import sdim
from hashtab.kernels.core import to_ragged
from hashtab.kernels.core.dispatch import Impl
from tests.kernels.histories import Histories, offsets_of
from tests.tolerances import TOLERANCE

TAU = 3
any_histories = st.builds(
    Histories.random,
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    queries=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
any_impl: st.SearchStrategy[Impl] = st.sampled_from(["reference", "native"])
few = settings(max_examples=25, deadline=None, derandomize=True)
CLOSE = TOLERANCE[torch.float64]


def encode(h: Histories, values: Tensor, impl: Impl) -> Tensor:
    return sdim.encode(values, offsets_of([len(values)]), h.planes, TAU, impl=impl)


def attend_at(h: Histories, impl: Impl, **changed: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "values": h.values,
        "offsets": h.offsets,
        "queries": h.queries,
        "query_offsets": h.query_offsets,
        "cuts": h.cuts,
        "last": None,
    }
    return sdim.attend_at(**(arguments | changed), planes=h.planes, tau=TAU, impl=impl)


@few
@given(any_histories, any_impl, st.data())
def test_tables_add_up(h: Histories, impl: Impl, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(h.values)))
    parts = encode(h, h.values[:at], impl) + encode(h, h.values[at:], impl)
    torch.testing.assert_close(parts, encode(h, h.values, impl), **CLOSE)


@few
@given(any_histories, any_impl)
def test_order_does_not_matter(h: Histories, impl: Impl) -> None:
    shuffled = h.values[torch.randperm(len(h.values), generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(encode(h, shuffled, impl), encode(h, h.values, impl), **CLOSE)


@few
@given(any_histories, any_impl)
def test_adding_and_removing_restores_the_table(h: Histories, impl: Impl) -> None:
    with_more = encode(h, torch.cat([h.values, h.queries]), impl)
    restored = with_more - encode(h, h.queries, impl)
    torch.testing.assert_close(restored, encode(h, h.values, impl), **CLOSE)


@few
@given(any_histories, any_impl, st.integers(1, 50))
def test_a_window_sees_what_a_history_cut_to_it_would(h: Histories, impl: Impl, last: int) -> None:
    windowed = attend_at(h, impl, last=last)
    for i, (user, cut) in enumerate(zip(h.user.tolist(), h.cuts.tolist(), strict=True)):
        first = int(h.offsets[user])
        seen = h.values[first + max(0, cut - last) : first + cut]
        alone = sdim.attend(
            seen, offsets_of([len(seen)]), h.queries[None, None, i], h.planes, TAU, impl=impl
        )
        torch.testing.assert_close(windowed[i], alone[0, 0], **CLOSE)


@few
@given(any_histories, any_impl, st.floats(allow_nan=True, allow_infinity=True))
def test_padding_changes_nothing(h: Histories, impl: Impl, content: float) -> None:
    lengths = h.offsets.diff()
    padded = torch.full((len(lengths), int(lengths.max()) + 3, 8), content, dtype=torch.float64)
    for user, length in enumerate(lengths.tolist()):
        padded[user, :length] = h.values[h.offsets[user] : h.offsets[user + 1]]
    values, offsets = to_ragged(padded, lengths)
    assert torch.equal(values, h.values)
    assert torch.equal(attend_at(h, impl, values=values, offsets=offsets), attend_at(h, impl))


@few
@given(any_histories, st.sampled_from([None, 4]))
def test_batch_mates_and_other_queries_change_no_bit(h: Histories, last: int | None) -> None:
    together = attend_at(h, "native", last=last)
    for i, user in enumerate(h.user.tolist()):
        own = slice(int(h.offsets[user]), int(h.offsets[user + 1]))
        alone = attend_at(
            h,
            "native",
            values=h.values[own],
            offsets=offsets_of([own.stop - own.start]),
            queries=h.queries[i : i + 1],
            query_offsets=offsets_of([1]),
            cuts=h.cuts[i : i + 1],
            last=last,
        )
        if last is None:
            assert torch.equal(alone[0], together[i])
        else:  # behaviours enter and leave the sums in another order
            torch.testing.assert_close(alone[0], together[i], **CLOSE)


@few
@given(any_histories, any_impl, st.floats(1e-6, 1e6))
def test_the_size_of_batch_mates_changes_nothing(h: Histories, impl: Impl, size: float) -> None:
    values = h.values.clone()
    values[: int(h.offsets[1])] *= size
    own = h.user > 0
    found = attend_at(h, impl, values=values)[own]
    torch.testing.assert_close(found, attend_at(h, impl)[own], rtol=1e-6, atol=1e-6)


@few
@given(any_histories, any_impl)
def test_what_happens_after_the_cut_is_not_seen(h: Histories, impl: Impl) -> None:
    values = h.values.clone()
    for user in range(len(h.offsets) - 1):
        latest = int(h.cuts[h.user == user].max())
        values[int(h.offsets[user]) + latest : int(h.offsets[user + 1])] = 1e3
    torch.testing.assert_close(attend_at(h, impl, values=values), attend_at(h, impl), **CLOSE)


@few
@given(any_histories, any_impl)
def test_an_empty_view_reads_zeros_with_zero_gradient(h: Histories, impl: Impl) -> None:
    values = h.values.requires_grad_()
    interest = attend_at(h, impl, values=values, cuts=torch.zeros_like(h.cuts))
    assert not interest.any()
    (grad,) = torch.autograd.grad(interest.sum(), values)
    assert not grad.any()
