"""Tables are sums that no order and no batching changes, up to a bound that is refused."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from hashtab.serving.store import COMPONENT_LIMIT, SCALE, TableOverflowError, add, sum_by_bucket

few = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def behaviours(seed: int, count: int, limit: int = COMPONENT_LIMIT) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (count, 3))
    return codes, rng.integers(-limit + 1, limit, (count, 5)).astype(np.int32)


@few
@given(seeds, st.integers(0, 60))
def test_a_sum_is_its_definition(seed: int, count: int) -> None:
    codes, vectors = behaviours(seed, count)
    expected = np.zeros((3, 4, 5), np.int64)
    for code, vector in zip(codes, vectors, strict=True):
        for group, bucket in enumerate(code):
            expected[group, bucket] += vector
    found = sum_by_bucket(codes, vectors, 4)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


@few
@given(seeds, st.integers(1, 60), st.lists(st.integers(0, 60), max_size=4))
def test_order_and_batches_do_not_change_a_bit(seed: int, count: int, cuts: list[int]) -> None:
    codes, vectors = behaviours(seed, count)
    at_once = add(np.zeros((3, 4, 5), np.int32), sum_by_bucket(codes, vectors, 4))
    order = np.random.default_rng(seed).permutation(count)
    table = np.zeros((3, 4, 5), np.int32)
    for part in np.split(order, sorted(min(cut, count) for cut in cuts)):
        table = add(table, sum_by_bucket(codes[part], vectors[part], 4))
    assert table.dtype == np.int32
    assert table.tobytes() == at_once.tobytes()


@few
@given(seeds)
def test_taking_behaviours_out_restores_the_table(seed: int) -> None:
    codes, vectors = behaviours(seed, 20)
    start = np.full((3, 4, 5), 7, np.int32)
    sums = sum_by_bucket(codes, vectors, 4)
    assert add(add(start, sums), -sums).tobytes() == start.tobytes()


@pytest.mark.parametrize(("start", "bound"), [(0, 2**31 - 1), (-5, 2**31 - 1), (9, -(2**31))])
def test_a_sum_overflows_exactly_at_the_bound(start: int, bound: int) -> None:
    table = np.full((2, 3, 4), start, np.int32)
    step = np.zeros((2, 3, 4), np.int64)
    step[1, 2, 3] = bound - start
    assert add(table, step)[1, 2, 3] == bound
    step[1, 2, 3] += np.sign(bound)
    with pytest.raises(TableOverflowError, match=r"group 1, bucket 2, component 3.*32768"):
        add(table, step)
    assert (table == start).all()


@pytest.mark.parametrize("increment", [2**63 - 1, -(2**63)])
def test_increments_that_would_wrap_int64_overflow_too(increment: int) -> None:
    table = np.full((1, 1, 1), np.sign(increment), np.int32)
    with pytest.raises(TableOverflowError):
        add(table, np.full((1, 1, 1), increment, np.int64))


def test_behaviours_below_the_stated_bound_never_overflow() -> None:
    component = 100 * SCALE
    codes = np.zeros((327, 1), np.int64)  # 327 * 100 < 32768 <= 328 * 100
    vectors = np.full((328, 1), component, np.int32)
    table = add(np.zeros((1, 1, 1), np.int32), sum_by_bucket(codes, vectors[:327], 1))
    with pytest.raises(TableOverflowError):
        add(table, sum_by_bucket(codes[:1], vectors[:1], 1))


@pytest.mark.parametrize("code", [-1, 4])
def test_a_code_outside_the_buckets_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 4\), got"):
        sum_by_bucket(np.full((2, 1), code), np.ones((2, 1), np.int32), 4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 1\) and \(3, 1\)"):
        sum_by_bucket(np.zeros((2, 1), np.int64), np.ones((3, 1), np.int32), 4)
    with pytest.raises(ValueError, match=r"table is \(1, 1, 1\) but increments are \(1, 1, 2\)"):
        add(np.zeros((1, 1, 1), np.int32), np.zeros((1, 1, 2), np.int64))
