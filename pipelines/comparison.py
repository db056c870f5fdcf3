"""Whether one model is better than another: a paired bootstrap over the same users or rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hashtab.features.errors import DataError
from hashtab.features.metrics import user_aucs
from hashtab.pipelines.evaluation import Predictions
from hashtab.pipelines.plots import COLOURS, DPI, dress

_SEED = 0
_AT_ONCE = 1 << 22  # drawn users in memory


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Challenger against champion on the same samples.

    Args:
        gain: what is compared, in words; above 0 where the challenger is better.
        over: what is resampled, in a word.
        differences: `[R]`, the gain in each resample.
        difference: the same over all of them.
        low: lower end of the confidence interval.
        high: upper end.
    """

    gain: str
    over: str
    differences: NDArray[np.float64]
    difference: float
    low: float
    high: float

    @property
    def better(self) -> bool:
        """Whether the challenger is better beyond doubt: the whole interval lies above 0."""
        return self.low > 0

    @property
    def share(self) -> float:
        """Share of the resamples in which the challenger is better."""
        return float((self.differences > 0).mean())


def compare(
    champion: Predictions, challenger: Predictions, resamples: int, confidence: float
) -> Comparison:
    """Resample users with replacement and compare the two models' gAUC in each resample.

    Args:
        champion: its scores of a split.
        challenger: scores of the same samples in the same order.
        resamples: number R.
        confidence: that the interval covers, for example 0.95.

    Raises:
        DataError: if no user has samples of both labels.
    """
    before, samples = user_aucs(champion.labels, champion.scores, champion.users)
    after, _ = user_aucs(challenger.labels, challenger.scores, challenger.users)
    both = ~np.isnan(before)
    if not both.any():
        raise DataError("no user has samples of both labels: there is nothing to compare")
    gain, weight = (after - before)[both], samples[both].astype(np.float64)
    found, low, high = bootstrap(gain, weight, resamples, confidence)
    return Comparison(
        gain="gAUC of the challenger less that of the champion",
        over="users",
        differences=found,
        difference=float(np.average(gain, weights=weight)),
        low=low,
        high=high,
    )


def compare_losses(
    champion: NDArray[np.float64],
    challenger: NDArray[np.float64],
    loss: str,
    resamples: int,
    confidence: float,
) -> Comparison:
    """Resample rows with replacement and compare the two models' mean loss in each resample.

    Args:
        champion: `[N]`, its loss of each row.
        challenger: `[N]`, its loss of the same rows.
        loss: its name.
        resamples: number R.
        confidence: that the interval covers, for example 0.95.
    """
    gain = champion - challenger
    found, low, high = bootstrap(gain, np.ones(len(gain)), resamples, confidence)
    return Comparison(
        gain=f"{loss} of the champion less that of the challenger",
        over="rows",
        differences=found,
        difference=float(gain.mean()),
        low=low,
        high=high,
    )


def bootstrap(
    gain: NDArray[np.float64], weight: NDArray[np.float64], resamples: int, confidence: float
) -> tuple[NDArray[np.float64], float, float]:
    """Return the weighted mean of each resample with replacement, and the ends of the interval.

    Args:
        gain: `[N]`, at least one.
        weight: `[N]`.
        resamples: number R.
        confidence: that the interval covers.
    """
    random = np.random.default_rng(_SEED)
    found = np.empty(resamples)
    at_once = max(1, _AT_ONCE // len(gain))
    for start in range(0, resamples, at_once):
        part = found[start : start + at_once]
        drawn = random.integers(0, len(gain), (len(part), len(gain)))
        part[:] = (gain[drawn] * weight[drawn]).sum(1) / weight[drawn].sum(1)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return found, float(low), float(high)


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draw how often each difference came out, with the interval and 0."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    dress(axes, comparison.gain, f"resamples of {comparison.over}")
    axes.hist(comparison.differences, bins=50, color=COLOURS[0])
    axes.axvline(0, color="black", linewidth=1)
    for end in (comparison.low, comparison.high):
        axes.axvline(end, color=COLOURS[1], linewidth=1, linestyle="--")
    figure.savefig(path, dpi=DPI)
