"""Plots of finished runs, drawn from their results alone and without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hashtab.features.metrics import HISTORY_EDGES
from hashtab.pipelines.runs import Result

_SIZE = (7.0, 4.2)
DPI = 120
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def plot_run(result: Result, folder: Path) -> None:
    """Draw learning curves, calibration and gAUC by history length of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    learning_curves(result, folder / "learning_curves.png")
    calibration(result, folder / "calibration.png")
    by_history({split: result.metrics[split] for split in _splits(result)}, folder, result.name)


def plot_rivals(test_metrics: Mapping[str, Mapping[str, float]], folder: Path) -> None:
    """Draw rivals, given by name and test metrics, beside each other."""
    folder.mkdir(parents=True, exist_ok=True)
    by_history(test_metrics, folder, "test gAUC of the rivals")
    figure, axes = axes_of("test gAUC", "")
    names = list(test_metrics)
    values = [metrics["gauc"] for metrics in test_metrics.values()]
    bars = axes.barh(names[::-1], values[::-1], color=COLOURS[0])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_xlim(0.5, max(0.6, *values) + 0.03)
    axes.grid(axis="y", visible=False)
    figure.savefig(folder / "rivals.png", dpi=DPI)


def learning_curves(result: Result, path: Path) -> None:
    """Draw training loss and validation gAUC over epochs; the kept epoch is marked."""
    epochs = [epoch.number for epoch in result.epochs]
    figure = Figure(figsize=(_SIZE[0], _SIZE[1]), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [e.loss for e in result.epochs], "o-", color=COLOURS[0], label="training")
    losses = [e.validation["log_loss"] for e in result.epochs]
    left.plot(epochs, losses, "s--", color=COLOURS[1], label="validation")
    right.plot(epochs, [e.gauc for e in result.epochs], "s--", color=COLOURS[1])
    for axes, label in ((left, "log loss"), (right, "validation gAUC")):
        axes.axvline(result.best_epoch, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xticks(epochs)
        dress(axes, "epoch", label)
    left.legend(frameon=False)
    figure.suptitle(f"{result.name}: epoch {result.best_epoch} is kept")
    figure.savefig(path, dpi=DPI)


def calibration(result: Result, path: Path) -> None:
    """Draw the share of positives against the prediction, in groups of equally many samples."""
    lines = {}
    for split in _splits(result):
        error = result.metrics[split]["calibration_error"]
        lines[f"{split}, expected error {error:.3f}"] = result.calibration[split]
    draw_calibration(lines, f"{result.name}: calibration", path)


def draw_calibration(
    lines: Mapping[str, Sequence[Sequence[float]]], title: str, path: Path
) -> None:
    """Draw lines of (mean prediction, share of positives), given by their labels."""
    figure, axes = axes_of("mean prediction", "share of positives")
    highest = 0.0
    for colour, (label, groups) in zip(COLOURS, lines.items(), strict=False):
        predicted, observed = zip(*groups, strict=True)
        axes.plot(predicted, observed, "o-", color=colour, label=label)
        highest = max(highest, *predicted, *observed)
    axes.plot([0, highest], [0, highest], color="grey", linewidth=0.8, linestyle=":")
    axes.set_title(title)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=DPI)


def by_history(metrics: Mapping[str, Mapping[str, float]], folder: Path, title: str) -> None:
    """Draw gAUC by history length, one line for each named set of metrics."""
    figure, axes = axes_of("behaviours before the request", "gAUC")
    present = [
        (name, label) for name, label in _buckets() if any(name in m for m in metrics.values())
    ]
    for colour, (line, values) in zip(COLOURS, metrics.items(), strict=False):
        heights = [values.get(name, float("nan")) for name, _ in present]
        axes.plot([label for _, label in present], heights, "o-", color=colour, label=line)
    axes.set_title(title)
    axes.legend(frameon=False)
    figure.savefig(folder / "gauc_by_history.png", dpi=DPI)


def _buckets() -> list[tuple[str, str]]:
    """Metric names of the history slices with their labels, short histories first."""
    lows, highs = HISTORY_EDGES[:-1], HISTORY_EDGES[1:]
    between = [
        (f"gauc/history_{a}_{b - 1}", f"{a}-{b - 1}") for a, b in zip(lows, highs, strict=True)
    ]
    longest = HISTORY_EDGES[-1]
    return [("gauc/history_0", "0"), *between, (f"gauc/history_{longest}_up", f"{longest}+")]


def _splits(result: Result) -> list[str]:
    return [split for split in ("validation", "test") if split in result.metrics]


def axes_of(x: str, y: str) -> tuple[Figure, Axes]:
    """Return a figure of the usual size, and its axes with their names."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    dress(axes, x, y)
    return figure, axes


def dress(axes: Axes, x: str, y: str) -> None:
    """Name the axes, and leave out what says nothing."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
