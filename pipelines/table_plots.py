"""Plots of a finished training on a table, drawn without a display."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hashtab.pipelines.evaluation import calibration_groups
from hashtab.pipelines.plots import COLOURS, DPI, axes_of, draw_calibration, dress
from hashtab.pipelines.table_data import spread
from hashtab.pipelines.table_graph import Estimator
from hashtab.pipelines.table_runs import TableResult

_MOST_BARS, _MOST_LABELS, _MOST_POINTS = 20, 20, 5000
_MOST_STRIPS, _MOST_EXPLAINED = 12, 500


def plot_table_run(
    result: TableResult,
    target: NDArray[Any],
    predicted: NDArray[Any],
    classes: NDArray[Any] | None,
    folder: Path,
) -> None:
    """Draw what a training came to.

    Args:
        result: of the training.
        target: `[N]`, of the test rows.
        predicted: probabilities `[N, K]`, values `[N]` or quantiles `[N, Q]`, of the test rows.
        classes: `[K]`; None of a regression.
        folder: of the plots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if result.curves:
        curves(result, folder / "learning_curves.png")
    column_importances(result, folder / "importances.png")
    if classes is None:
        predicted_against_true(target, predicted, result, folder / "predicted.png")
        return
    confusion(target, predicted, classes, result, folder / "confusion.png")
    binary = len(classes) == 2
    right = target == classes[1] if binary else target == classes[predicted.argmax(1)]
    scores = (predicted[:, 1] if binary else predicted.max(1)).astype(np.float64)
    error = result.metrics["test"]["calibration_error"]
    what = f"{classes[1]}" if binary else "the likeliest class"
    lines = {f"test, {what}, expected error {error:.3f}": calibration_groups(right, scores)}
    draw_calibration(lines, f"{result.name}: calibration", folder / "calibration.png")


def curves(result: TableResult, path: Path) -> None:
    """Draw what the estimator tells of each epoch, a panel for each number."""
    names = list(result.curves[0])
    figure = Figure(figsize=(max(5.0, 3.5 * len(names)), 4.2), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False).flat, strict=True):
        dress(axes, "epoch", name.replace("_", " "))
        values = [epoch.get(name, float("nan")) for epoch in result.curves]
        axes.plot(range(1, 1 + len(values)), values, color=COLOURS[0])
    figure.suptitle(result.name)
    figure.savefig(path, dpi=DPI)


def column_importances(result: TableResult, path: Path) -> None:
    """Draw how much worse the test loss is with each column shuffled, the worst first."""
    shown = list(result.importances.items())[:_MOST_BARS][::-1]
    figure, axes = axes_of("test loss with the column shuffled, less the usual one", "")
    axes.barh([name for name, _ in shown], [value for _, value in shown], color=COLOURS[0])
    axes.grid(axis="y", visible=False)
    axes.set_title(f"{result.name}: columns")
    figure.savefig(path, dpi=DPI)


def explanations(estimator: Estimator, rows: pl.DataFrame, result: TableResult, path: Path) -> None:
    """Draw what drove the prediction of each row: a strip of dots for each column.

    Args:
        estimator: fitted, with an embedding for each column.
        rows: that it did not learn from; of many some, evenly spaced.
        result: of the training.
        path: of the plot.
    """
    rows = rows[spread(len(rows), min(len(rows), _MOST_EXPLAINED))]
    shares, towards = contributions(estimator, rows)
    weightiest = np.abs(shares.to_numpy()).mean(0).argsort()[-_MOST_STRIPS:]
    shown = [shares.columns[column] for column in weightiest]
    figure, axes = axes_of(f"what the column did, to the right for {towards}", "")
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(rows))
    colours = colormaps["coolwarm"].with_extremes(bad="grey")
    for place, name in enumerate(shown):
        where = (shares[name].to_numpy(), place + jitter)
        values = axes.scatter(*where, 8, _ranks(rows[name]), cmap=colours, plotnonfinite=True)
        values.set_clim(0, 1)
    axes.set_yticks(range(len(shown)), shown)
    bar = figure.colorbar(values, label="value of the column; grey: text or missing")
    bar.set_ticks([0, 1], labels=["lowest", "highest"])
    axes.set_title(f"{result.name}: test rows")
    figure.savefig(path, dpi=DPI)


def contributions(estimator: Estimator, rows: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    """Return what each column did to the prediction of each row, and what is more if it is above 0.

    Of two classes that is the second for all rows, of more the one that is predicted for a row; of
    quantiles the lowest.
    """
    shares: pl.DataFrame = estimator.explain(rows)
    if not hasattr(estimator, "classes_"):
        what = f"quantile {estimator.quantiles[0]}" if estimator.quantiles else "prediction"
        return shares, f"a higher {what}"
    if len(estimator.classes_) > 2:
        return shares, "the class that is predicted"
    second = estimator.classes_[1]
    sign = pl.Series(np.where(estimator.predict(rows) == second, 1, -1))
    return shares.with_columns(pl.all() * sign), str(second)


def _ranks(values: pl.Series) -> NDArray[np.float64]:
    """Place numbers and truth values from 0 to 1 by their order; NaN where missing, or text."""
    if values.dtype == pl.String:
        return np.full(len(values), np.nan)
    there = values.cast(pl.Float64).fill_nan(None)
    return ((there.rank() - 1) / max(1, there.count() - 1)).to_numpy()


def confusion(
    target: NDArray[Any],
    predicted: NDArray[Any],
    classes: NDArray[Any],
    result: TableResult,
    path: Path,
) -> None:
    """Draw how many test rows of each class are taken for which."""
    place = {label: i for i, label in enumerate(classes.tolist())}
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, ([place[label] for label in target.tolist()], predicted.argmax(1)), 1)
    figure, axes = axes_of("predicted", "true")
    axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    if len(classes) <= _MOST_LABELS:
        axes.set_xticks(range(len(classes)), [str(label) for label in classes], rotation=90)
        axes.set_yticks(range(len(classes)), [str(label) for label in classes])
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if count > counts[row].sum() / 2 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour)
    axes.set_title(f"{result.name}: test rows")
    figure.savefig(path, dpi=DPI)


def predicted_against_true(
    target: NDArray[Any], predicted: NDArray[Any], result: TableResult, path: Path
) -> None:
    """Draw the test rows' predictions against what came true; of quantiles the middle one.

    A line goes from the lowest quantile to the highest.
    """
    chosen = np.random.default_rng(0).permutation(len(target))[:_MOST_POINTS]
    figure, axes = axes_of("predicted", "true")
    shown, true = predicted.reshape(len(target), -1)[chosen], target[chosen]
    axes.hlines(true, shown[:, 0], shown[:, -1], color=COLOURS[5], linewidth=0.8, alpha=0.4)
    axes.scatter(shown[:, shown.shape[1] // 2], true, 8, color=COLOURS[0], alpha=0.4)
    ends = [float(target.min()), float(target.max())]
    axes.plot(ends, ends, color="grey", linewidth=0.8, linestyle=":")
    found = ", ".join(
        f"{name.replace('_', ' ')} {result.metrics['test'][name]:.3f}"
        for name in ("r2", "pinball_loss", "coverage")
        if name in result.metrics["test"]
    )
    axes.set_title(f"{result.name}: test, {found}")
    figure.savefig(path, dpi=DPI)
