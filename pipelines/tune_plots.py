"""Plots of a tuning: what each searched setting is worth, and how the trials learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from hashtab.pipelines.plots import COLOURS, DPI, dress
from hashtab.pipelines.search_space import RATES, Values
from hashtab.pipelines.tuning import FINISHED, STOPPED_EARLY, Trial, gauc

_COLUMNS = 3
_LOOKS = {FINISHED: (COLOURS[0], "o"), STOPPED_EARLY: (COLOURS[4], "x")}
_BEST = COLOURS[1]


@dataclass(frozen=True)
class Tried:
    """A trial as its plots show it.

    Args:
        name: of the trial.
        values: of the searched settings.
        state: how it ended.
        score: that trials are ranked by.
    """

    name: str
    values: Values
    state: str
    score: float


def plot_tuning(ranking: Sequence[Trial], folder: Path) -> None:
    """Draw the trials with a result, the best one first, against their settings and over epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    tried = [Tried(t.name, t.values, t.state, gauc(t.best)) for t in ranking]
    searched_settings(tried, "best validation gAUC", RATES, folder / "searched_settings.png")
    learning_curves(ranking, folder / "learning_curves.png")


def searched_settings(
    ranking: Sequence[Tried], measure: str, logarithmic: Sequence[str], path: Path
) -> None:
    """Draw the score of each trial against each searched setting.

    Args:
        ranking: of the trials, the best one first.
        measure: what the score is.
        logarithmic: settings that are drawn so.
        path: of the plot.
    """
    names = list(ranking[0].values)
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(7.0, 3.4 * columns), 0.8 + 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for name, axes in zip(names, grid, strict=False):
        dress(axes, name, measure)
        _scatter(axes, name, ranking)
        if name in logarithmic:
            _log_scale(axes)
    for unused in list(grid)[len(names) :]:
        unused.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=DPI)


def _scatter(axes: Axes, name: str, ranking: Sequence[Tried]) -> None:
    for state, (colour, marker) in _LOOKS.items():
        trials = [trial for trial in ranking if trial.state == state]
        x, y = [trial.values[name] for trial in trials], [trial.score for trial in trials]
        axes.scatter(x, y, c=colour, marker=marker, label=state)
    best = ranking[0]
    label = f"best, {best.name}"
    axes.scatter([best.values[name]], [best.score], 130, c=_BEST, marker="*", label=label)
    if isinstance(best.values[name], int):
        axes.set_xticks(sorted({trial.values[name] for trial in ranking}))


def _log_scale(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def learning_curves(ranking: Sequence[Trial], path: Path) -> None:
    """Draw the validation gAUC of all trials over their epochs, the best one on top."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    dress(axes, "epoch", "validation gAUC")
    for trial in reversed(ranking):
        best = trial is ranking[0]
        epochs = trial.run.result.epochs
        axes.plot(
            [epoch.number for epoch in epochs],
            [gauc(epoch) for epoch in epochs],
            marker=_LOOKS[trial.state][1],
            color=_BEST if best else "#999999",
            linewidth=2.0 if best else 0.9,
            label=f"{trial.name}, the best" if best else None,
        )
    axes.set_xticks(range(1, 1 + max(len(trial.run.result.epochs) for trial in ranking)))
    axes.set_title("trials; crosses were stopped early")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=DPI)
