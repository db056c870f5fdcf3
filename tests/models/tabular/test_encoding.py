"""Numbers as a bounded linear part and a place among quantiles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hashtab.models.tabular.encoding import NumericEncoder
from tests.models.tabular.tables import Array

BINS = 8
anything = st.floats(allow_nan=False, width=64)


def encoded(encoder: NumericEncoder, values: list[float] | Array) -> tuple[Tensor, Tensor, Tensor]:
    column = torch.tensor(np.array(values, dtype=np.float64))[:, None]
    linear, place, missing = encoder(column)
    return linear[:, 0], place[:, 0], missing[:, 0]


def fitted(values: list[float] | Array, bins: int = BINS) -> NumericEncoder:
    return NumericEncoder(np.array(values, dtype=np.float64)[:, None], bins)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(anything | st.just(float("nan")), min_size=1, max_size=30),
    st.lists(anything, min_size=1, max_size=30),
)
def test_larger_numbers_are_encoded_as_larger(fit: list[float], values: list[float]) -> None:
    linear, place, missing = encoded(fitted(fit), np.sort(values))
    assert not missing.any()
    for part in (linear, place):
        assert part.isfinite().all()
        assert (part.diff() >= -1e-6).all()
    assert (linear.abs() <= 3.0001).all()
    assert ((place >= 0) & (place <= BINS)).all()


def test_a_quantile_is_one_bin_further() -> None:
    values = np.random.default_rng(0).exponential(size=1000)
    at = np.quantile(values, np.linspace(0, 1, BINS + 1))
    linear, place, _ = encoded(fitted(values), at)
    torch.testing.assert_close(place, torch.arange(BINS + 1.0))
    assert linear[BINS // 2].abs() < 1e-6  # the median


@settings(max_examples=100, deadline=None)
@given(
    st.lists(anything, min_size=1, max_size=30),
    st.lists(anything, min_size=1, max_size=30),
    st.integers(1, 12),
)
def test_a_place_is_found_as_by_its_definition(
    fit: list[float], values: list[float], bins: int
) -> None:
    encoder = fitted(fit, bins)
    x = torch.tensor(values, dtype=torch.float64).clamp(-1e30, 1e30)[:, None]
    found, expected = encoder._place_by_search(x), encoder._place_by_sum(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_missing_number_is_the_median_and_marked() -> None:
    encoder = fitted([1, 2, 3, 10, float("nan")])
    linear, place, missing = encoded(encoder, [float("nan"), 2.5])
    assert missing.tolist() == [True, False]
    assert linear[0] == linear[1]
    assert place[0] == place[1]


def test_seconds_since_1970_keep_their_minutes() -> None:
    start = 1.7e9
    encoder = fitted(start + 60 * np.arange(1000.0))
    linear, place, _ = encoded(encoder, start + 60 * np.arange(1000.0))
    assert (linear.diff() > 0).all()
    assert (place.diff() > 0).all()
    near, _, _ = encoded(fitted(60 * np.arange(1000.0)), 60 * np.arange(1000.0))
    torch.testing.assert_close(linear, near)


def test_a_column_of_few_values_has_a_bin_between_each_two() -> None:
    values = [0.0] * 90 + [1, 2, 5, 9]
    _, place, _ = encoded(fitted(values), [-1, 0, 1, 2, 3.5, 5, 9, 99])
    torch.testing.assert_close(place, torch.tensor([0, 0, 1, 2, 2.5, 3, 4, 4]))


@pytest.mark.parametrize("zeros", [0, 1_000, 100_000])
def test_a_column_that_is_mostly_zero_has_its_bins_where_it_is_not(zeros: int) -> None:
    values = np.concatenate([np.zeros(zeros), 1 + np.random.default_rng(0).exponential(size=1000)])
    _, place, _ = encoded(fitted(values), np.quantile(values[zeros:], [0.25, 0.5, 0.75, 1]))
    # The first of the bins may lie between zero and the others.
    torch.testing.assert_close(place.diff(), torch.full((3,), BINS / 4), atol=0.8, rtol=0)
    assert place[3] == BINS


@pytest.mark.parametrize("values", [[5.0] * 4, [float("nan")] * 4])
def test_what_never_varies_is_zero(values: list[float]) -> None:
    linear, place, missing = encoded(fitted(values), [*values, -1e9, 3.0, float("inf")])
    assert not linear.any()
    assert not place.any()
    assert missing.tolist() == [bool(np.isnan(v)) for v in values] + [False] * 3


def test_infinities_are_the_ends() -> None:
    encoder = fitted([*range(100), float("inf"), -float("inf")])
    linear, place, _ = encoded(encoder, [-float("inf"), 50.0, float("inf")])
    torch.testing.assert_close(linear, torch.tensor([-3.0, 0.0, 3.0]), atol=0.1, rtol=0)
    assert place[0] == 0
    assert place[2] == BINS


def test_a_tiny_spread_does_not_overflow() -> None:
    linear, _, _ = encoded(fitted([0, 1e-300, 2e-300, 3e-300]), [-1.0, 1e-300, float("inf")])
    assert linear.isfinite().all()
    assert linear[0] < linear[1] < linear[2]


def test_from_state_is_the_same_encoder() -> None:
    numbers = np.random.default_rng(0).normal(size=(50, 3))
    encoder = NumericEncoder(numbers, 5)
    again = NumericEncoder.from_state(encoder.state_dict())
    for a, b in zip(encoder(torch.tensor(numbers)), again(torch.tensor(numbers)), strict=True):
        assert torch.equal(a, b)
