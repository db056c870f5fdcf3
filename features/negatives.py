"""What could have been shown, and draws from it that depend on nothing but seed and sample."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hashtab.features.schema import Negatives
from hashtab.features.storage import Array

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

_MAX_TRIES = 32


@dataclass(frozen=True)
class Candidates:
    """Items that could have been shown, as ranges of one array.

    Args:
        rows: `[P]` catalogue rows; what one request could have shown is one range of them.
        until: `[P]` running total of the items' behaviours in training time.
    """

    rows: Array
    until: Array

    @classmethod
    def of(cls, rows: Array, train_counts: Array) -> Self:
        """Build from rows and the training counts of the whole catalogue."""
        return cls(rows, np.cumsum(train_counts[rows]))

    def pick(self, scheme: str, chance: NDArray[np.float64], starts: Ints, ends: Ints) -> Ints:
        """Pick one position in each range `[starts, ends)`; `chance` is uniform in [0, 1)."""
        if scheme == "uniform":
            return starts + (chance * (ends - starts)).astype(np.int64)
        before = np.where(starts > 0, self.until[starts - 1], 0)
        total = self.until[ends - 1] - before
        wanted = before + (chance * total).astype(np.int64)
        return np.asarray(np.searchsorted(self.until, wanted, side="right"))


def draw(
    rule: Negatives,
    candidates: Candidates,
    starts: Ints,
    ends: Ints,
    identities: Hashes,
    groups: Ints,
    taken: Ints,
) -> Ints:
    """Draw negatives for each positive, with replacement, never an item of `taken`.

    Args:
        rule: scheme, number and seed.
        candidates: what the ranges point into.
        starts: `[P]` where each positive's range begins.
        ends: `[P]` where it ends.
        identities: `[P]` hash of each positive's user and request.
        groups: `[P]` group of each positive within which an item that was taken is no negative.
        taken: sorted codes, group shifted left by 32 bits plus catalogue row.

    Returns:
        `[P * per_positive]` positions in `candidates.rows`; -1 where nothing free was found.
    """
    k = rule.per_positive
    drawn = np.full(len(starts) * k, -1, np.int64)
    draws = np.repeat(identities, k)
    draws = mix(
        mix(draws, np.uint64(rule.seed)), np.tile(np.arange(k, dtype=np.uint64), len(starts))
    )
    todo = np.flatnonzero(np.repeat(ends > starts, k))
    for attempt in range(_MAX_TRIES):
        if not len(todo):
            break
        positive = todo // k
        chance = uniform(mix(draws[todo], np.uint64(attempt)))
        picked = candidates.pick(rule.scheme, chance, starts[positive], ends[positive])
        codes = (groups[positive] << 32) + candidates.rows[picked]
        free = ~_contains(taken, codes)
        drawn[todo[free]] = picked[free]
        todo = todo[~free]
    return drawn


def _contains(ordered: Ints, values: Ints) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(values), bool)
    position = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    found: NDArray[np.bool_] = ordered[position] == values
    return found


def mix(state: Hashes, value: Hashes | np.uint64) -> Hashes:
    """Mix a value into a 64-bit state (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        z = state * np.uint64(0x9E3779B97F4A7C15) + value + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(state: Hashes) -> NDArray[np.float64]:
    """Numbers in [0, 1) from the upper 53 bits."""
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
