"""Pieces of users' rows: each row is in exactly one, found by searching the offsets."""

# Triton's functions take pointers and numbers of the device, which annotations cannot tell apart.
# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from hashtab.kernels.core import tiles
from tests.kernels.histories import offsets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _write_pieces(offsets_ptr, out_ptr, users, TILE: tl.constexpr):
    number = tl.program_id(0)
    user, begin, end = tiles.user_slot(offsets_ptr, users, number, TILE)
    tl.store(out_ptr + number * 3, user)
    tl.store(out_ptr + number * 3 + 1, begin)
    tl.store(out_ptr + number * 3 + 2, end)


def pieces(lengths: list[int], tile: int) -> list[tuple[int, int, int]]:
    offsets = offsets_of(lengths).to(DEVICE)
    count = tiles.slots(len(lengths), sum(lengths), tile)
    out = torch.full((count, 3), -1, device=DEVICE)
    kernel: Any = _write_pieces
    kernel[(count,)](offsets, out, len(lengths), tile)
    return [(user, begin, end) for user, begin, end in out.tolist() if begin < end]


@pytest.mark.parametrize(
    "lengths",
    [[5], [0], [16, 16], [0, 0, 40, 0, 1, 0], [3, 17, 64, 15, 0], [1] * 33, [0] * 130 + [20, 7]],
    ids=str,
)
def test_pieces_are_the_users_rows_cut_from_their_first(lengths: list[int]) -> None:
    tile, expected, first = 16, [], 0
    for user, length in enumerate(lengths):
        bounds = [*range(first, first + length, tile), first + length]
        steps = itertools.pairwise(bounds)
        expected += [(user, begin, end) for begin, end in steps if begin < end]
        first += length
    assert pieces(lengths, tile) == expected
