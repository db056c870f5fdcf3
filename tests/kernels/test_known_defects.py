"""Mistakes found in public implementations of long-history attention; each test would catch one."""

import pytest
import torch

from hashtab.kernels import dense, sdim
from hashtab.kernels.core import to_ragged
from tests.kernels.histories import Histories, offsets_of


def test_offsets_past_2_to_the_24_stay_exact() -> None:
    # In float32, 2**24 + 1 rounds to 2**24: the second user would see a behaviour of the first.
    first = 2**24 + 1
    values = torch.ones(first + 2, 1)
    values[first:] = -1
    offsets, query_offsets = offsets_of([first, 2]), offsets_of([0, 2])
    queries = torch.tensor([[1.0], [-1.0]])
    cuts = torch.tensor([2, 2])
    interest = sdim.attend_at(
        values, offsets, queries, query_offsets, cuts, torch.ones(1, 1), 1, impl="native"
    )
    assert interest.tolist() == [[0.0], [-1.0]]
    exact = dense.target_attention_at(queries, query_offsets, cuts, values, offsets)
    assert exact.tolist() == [[-1.0], [-1.0]]


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_padding_does_not_beat_negative_scores(impl: dense.Impl) -> None:
    # A score masked to 0 instead of -inf wins over behaviours that dislike the candidate.
    values = torch.tensor([[-5.0], [-6.0], [1.0], [2.0], [3.0]])
    interest = dense.target_attention(
        torch.ones(2, 1, 1), values, offsets_of([2, 3]), scale=1.0, impl=impl
    )
    assert -6 < interest[0].item() < -5


def test_padding_is_never_hashed() -> None:
    # Padding of any content falls into some bucket of every group; it must not be counted there.
    h = Histories.random([3, 7], dtype=torch.float32)
    padded = torch.ones(2, 9, 8)
    padded[0, :3], padded[1, :7] = h.values[:3], h.values[3:]
    table = sdim.encode(*to_ragged(padded, torch.tensor([3, 7])), h.planes, 3)
    assert torch.equal(table, sdim.encode(h.values, h.offsets, h.planes, 3))


@pytest.mark.parametrize("length", [1, 5, 10, 48, 49, 50, 51])
def test_the_window_is_neither_shifted_nor_one_short(length: int) -> None:
    # "The last 50" is 50, the newest included, and shorter histories are fine.
    values = torch.zeros(length, 1)
    values[-1] = 1
    values[-50:] += 1
    arguments = (torch.ones(1, 1), offsets_of([1]), torch.tensor([length]))
    interest = dense.target_attention_at(
        *arguments, values, offsets_of([length]), scale=0.0, last=50
    )
    expected = values[-50:].mean().item()
    assert interest.item() == pytest.approx(expected)
    assert interest.item() >= 1


def test_wide_codes_stay_whole_numbers() -> None:
    # Codes kept in floating point collide once they are wide.
    planes = torch.eye(16)
    x = torch.ones(2, 16)
    x[1, 0] = -1
    assert sdim.codes(x, planes, 16).flatten().tolist() == [65535, 65534]
