"""From runs to figures: means, ranks, win rates, paired bootstrap intervals, critical difference.

Nothing here chooses. Every function takes all runs of the models that it is given, refuses the same
run twice, and uses only splits that all of these models have; so a split or seed that one model
does badly on cannot be left out for it alone, and no best-of can be asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from experiments.tabular_benchmark.data import Array, Task
from experiments.tabular_benchmark.metrics import HIGHER_IS_BETTER, PRIMARY
from experiments.tabular_benchmark.store import Key, Record

# The second holds rows of the first: never both in one mean.
OVERLAPPING = (("adult", "income-1995"), ("jungle", "jungle-binary"))
DRAWS = 2_000
LEVEL = 0.05


@dataclass(frozen=True)
class SetScores:
    """Scores of all models on the same splits of one set.

    Args:
        name: of the set.
        task: of the set.
        splits: names of the splits, as many as rows of the scores.
        scores: metric to `[splits, models]`, test parts only.
        seconds: `[splits, models]`, of fitting.
    """

    name: str
    task: Task
    splits: tuple[str, ...]
    scores: dict[str, Array]
    seconds: Array

    @property
    def primary(self) -> Array:
        """Scores that the task is ranked by, `[splits, models]`."""
        return self.scores[PRIMARY[self.task]]

    @property
    def losses(self) -> Array:
        """The same, turned so that less is better."""
        return -self.primary if PRIMARY[self.task] in HIGHER_IS_BETTER else self.primary


@dataclass(frozen=True)
class Interval:
    """A figure with the 2.5 and 97.5 % points of its bootstrap draws."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: Array) -> "Interval":
        low, high = np.percentile(draws, [2.5, 97.5])
        return cls(float(value), float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """Models side by side on the splits that all of them have.

    Args:
        models: labels, in the order of all columns.
        sets: those with at least one such split.
    """

    models: tuple[str, ...]
    sets: tuple[SetScores, ...]

    @classmethod
    def of(cls, records: Sequence[Record], models: Sequence[str]) -> "Comparison":
        """Pair runs up.

        Raises:
            ValueError: when a run is there twice, one split has two hashes, a model has no runs, or
                no split has all models.
        """
        runs: dict[Key, Record] = {}
        hashes: dict[tuple[str, str], str] = {}
        for record in records:
            if record.key in runs:
                raise ValueError(f"{record.key} is there twice; one run a model and split counts")
            runs[record.key] = record
            known = hashes.setdefault((record.set, record.split), record.split_hash)
            if known != record.split_hash:
                raise ValueError(f"{record.key}: split {record.split} has two hashes")
        by_model: dict[str, dict[tuple[str, str], Record]] = {model: {} for model in models}
        for record in runs.values():
            if record.label in by_model:
                by_model[record.label][record.set, record.split] = record
        for model, found in by_model.items():
            if not found:
                raise ValueError(f"{model} has no runs")
        common = set.intersection(*(set(found) for found in by_model.values()))
        if not common:
            raise ValueError(f"no split has runs of all of {', '.join(models)}")
        sets = []
        for name in sorted({name for name, _ in common}):
            splits = tuple(sorted(split for some, split in common if some == name))
            grid = [[by_model[model][name, split] for model in models] for split in splits]
            metrics = {
                metric: np.array([[run.metrics[metric] for run in row] for row in grid])
                for metric in grid[0][0].metrics
            }
            seconds = np.array([[run.fit_seconds for run in row] for row in grid])
            sets.append(SetScores(name, grid[0][0].task, splits, metrics, seconds))
        return cls(tuple(models), tuple(sets))

    def index(self, model: str) -> int:
        return self.models.index(model)

    @cached_property
    def counted(self) -> tuple[SetScores, ...]:
        """Sets that means over sets are taken of: none whose rows another one holds."""
        names = {some.name for some in self.sets}
        twice = {second for first, second in OVERLAPPING if first in names}
        return tuple(some for some in self.sets if some.name not in twice)

    @cached_property
    def ranks(self) -> Array:
        """Rank of each model on each counted set by its mean loss, 1 is best: `[sets, models]`."""
        return _ranks(np.array([some.losses.mean(axis=0) for some in self.counted]))

    def mean_ranks(self) -> list[Interval]:
        """Return the mean rank of each model over sets."""
        losses, picked = self._bootstrap
        draws = _over_sets(_ranks(losses), picked)
        return [
            Interval.of(value, some)
            for value, some in zip(self.ranks.mean(axis=0), draws.T, strict=True)
        ]

    def win_rates(self) -> list[float]:
        """Return each model's share of wins over sets and all others, a tie as half a win."""
        others = len(self.models) - 1
        return [float(rate) for rate in (others + 1 - self.ranks.mean(axis=0)) / max(others, 1)]

    def differences(self, reference: str, task: Task) -> list[Interval] | None:
        """Return each model's mean gain over a reference, positive when it is better.

        AUC and log loss: in their own units. RMSE: in shares of the reference's, as each set has
        its own unit. None when no counted set has the task.
        """
        chosen = np.array([some.task == task for some in self.counted])
        if not chosen.any():
            return None
        at = self.index(reference)
        observed = np.array([some.losses.mean(axis=0) for some in self.counted])[chosen]
        losses, _ = self._bootstrap
        draws = losses[:, chosen]
        random = np.random.default_rng(1)
        picked = random.integers(draws.shape[1], size=draws.shape[:2])
        gain, gains = _gain(observed, at, task).mean(axis=0), _gain(draws, at, task)
        drawn = _over_sets(gains, picked)
        return [Interval.of(value, some) for value, some in zip(gain, drawn.T, strict=True)]

    def wins(self, reference: str) -> list[float]:
        """Return on how many counted sets each model has a better mean, a tie as one half."""
        at = self.index(reference)
        losses = np.array([some.losses.mean(axis=0) for some in self.counted])
        mine, theirs = losses, losses[:, [at]]
        return [float(n) for n in ((mine < theirs) + 0.5 * (mine == theirs)).sum(axis=0)]

    def friedman(self) -> float | None:
        """Return the p-value of all models being alike; None for fewer than three."""
        if len(self.models) < 3 or len(self.counted) < 2:
            return None
        return float(stats.friedmanchisquare(*self.ranks.T).pvalue)

    def critical_difference(self) -> float:
        """Return how far mean ranks must be apart: Nemenyi, level 0.05 (Demsar, JMLR 2006)."""
        count = len(self.models)
        point = stats.studentized_range.ppf(1 - LEVEL, count, np.inf) / np.sqrt(2)
        return float(point * np.sqrt(count * (count + 1) / (6 * len(self.counted))))

    @cached_property
    def _bootstrap(self) -> tuple[Array, Array]:
        """Mean losses of redrawn splits, `[draws, sets, models]`; redrawn sets, `[draws, sets]`.

        Splits are redrawn for all models at once, so that intervals of differences are paired.
        Training parts of folds overlap: the intervals are somewhat too narrow for that reason.
        """
        random = np.random.default_rng(0)
        losses = []
        for some in self.counted:
            count = len(some.splits)
            rows = random.integers(count, size=(DRAWS, count))
            losses.append(some.losses[rows].mean(axis=1))
        found = np.stack(losses, axis=1)
        return found, random.integers(found.shape[1], size=found.shape[:2])


def _ranks(losses: Array) -> Array:
    return np.asarray(stats.rankdata(losses, axis=-1), np.float64)


def _over_sets(values: Array, picked: Array) -> Array:
    """Mean of `[draws, sets, models]` over the sets picked for each draw."""
    return np.asarray(np.take_along_axis(values, picked[:, :, None], axis=1).mean(axis=1))


def _gain(losses: Array, at: int, task: Task) -> Array:
    gain = losses[..., [at]] - losses
    return np.asarray(gain / losses[..., [at]] if task == "regression" else gain)
