"""The aggregated figures as markdown, CSV and a critical-difference plot."""

import csv
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.tabular_benchmark import splits
from experiments.tabular_benchmark.aggregate import Comparison, Interval
from experiments.tabular_benchmark.data import Array, Task
from experiments.tabular_benchmark.metrics import PRIMARY

TITLES: dict[Task, str] = {
    "binary": "AUC",
    "multiclass": "log loss, several classes",
    "regression": "RMSE",
}
GAINS: dict[Task, str] = {
    "binary": "AUC, points of 0.01",
    "multiclass": "log loss, points of 0.01",
    "regression": "RMSE, % of the reference's",
}


def write(comparison: Comparison, references: Sequence[str], folder: Path) -> None:
    """Write `tabular.md`, `tabular.csv` and `tabular_critical_difference.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tabular.md").write_text(markdown(comparison, references))
    _write_csv(comparison, folder / "tabular.csv")
    plot_critical_difference(comparison, folder / "tabular_critical_difference.svg")


def markdown(comparison: Comparison, references: Sequence[str]) -> str:
    """Return all tables as one page."""
    parts = [
        "Test parts of the splits that all of these models have; mean ± standard deviation over "
        "splits. Ranks and differences are over sets, with 95 % bootstrap intervals that redraw "
        "splits within sets and sets.",
        _summary(comparison),
        *(_against(comparison, some) for some in references if some in comparison.models),
        *(_per_set(comparison, task) for task in TITLES),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(comparison: Comparison) -> str:
    counted = len(comparison.counted)
    friedman = comparison.friedman()
    ranks, rates = comparison.mean_ranks(), comparison.win_rates()
    seconds = np.array([some.seconds.mean(axis=0) for some in comparison.counted])
    rows = [
        [model, _interval(rank, "{:.2f}"), f"{rate:.0%}", f"{float(spent):.1f}"]
        for model, rank, rate, spent in zip(
            comparison.models, ranks, rates, np.median(seconds, axis=0), strict=True
        )
    ]
    rows.sort(key=lambda row: float(row[1].split()[0]))
    title = f"## Over {counted} sets\n\n"
    critical = comparison.critical_difference()
    note = f"\n\nCritical difference of mean ranks (Nemenyi, 0.05): {critical:.2f}"
    note += "." if friedman is None else f"; all alike (Friedman): p = {friedman:.2g}."
    header = ["model", "mean rank", "win rate", "seconds to fit, median set"]
    return title + _table(header, rows) + note


def _against(comparison: Comparison, reference: str) -> str:
    found = {task: comparison.differences(reference, task) for task in TITLES}
    shown = {task: gains for task, gains in found.items() if gains is not None}
    wins = comparison.wins(reference)
    rows = []
    for at, model in enumerate(comparison.models):
        if model != reference:
            cells = [_interval(gains[at], "{:+.2f}", 100) for gains in shown.values()]
            rows.append([model, *cells, f"{wins[at]:g} of {len(comparison.counted)}"])
    header = ["model", *(GAINS[task] for task in shown), "sets won"]
    return f"## Gain over {reference}\n\nPositive is better.\n\n" + _table(header, rows)


def _per_set(comparison: Comparison, task: Task) -> str:
    known = splits.stored()
    rows = []
    for some in comparison.sets:
        if some.task != task:
            continue
        facts = known.get(some.name, {"rows": 0, "repeated_rows": 0, "splits": some.splits})
        left_out = "" if some in comparison.counted else " (in no mean)"
        mean, spread = some.primary.mean(axis=0), _spread(some.primary)
        best = int(some.losses.mean(axis=0).argmin())
        cells = [
            _mean(*pair, bold=at == best) for at, pair in enumerate(zip(mean, spread, strict=True))
        ]
        rows.append(
            [
                some.name + left_out,
                f"{facts['rows']:,}",
                f"{facts['repeated_rows']:,}",
                f"{len(some.splits)} of {len(facts['splits'])}",
                *cells,
            ]
        )
    if not rows:
        return ""
    header = ["set", "rows", "repeated rows", "splits", *comparison.models]
    return f"## {TITLES[task]}\n\n" + _table(header, rows)


def _spread(scores: Array) -> Array:
    """Standard deviation over splits, `[models]`; NaN for one split."""
    if len(scores) < 2:
        return np.full(scores.shape[1], np.nan)
    return np.asarray(scores.std(axis=0, ddof=1))


def _mean(mean: float, spread: float, *, bold: bool) -> str:
    digits = 4 if abs(mean) < 10 else 2 if abs(mean) < 1_000 else 0
    text = f"{mean:.{digits}f}"
    text = f"**{text}**" if bold else text
    return text if np.isnan(spread) else f"{text} ± {spread:.{digits}f}"


def _interval(some: Interval, form: str, times: float = 1) -> str:
    show: Callable[[float], str] = form.format
    return f"{show(some.value * times)} [{show(some.low * times)}, {show(some.high * times)}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write_csv(comparison: Comparison, path: Path) -> None:
    """Write mean and standard deviation of every metric, set and model."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["set", "task", "metric", "ranked_by", "model", "splits", "mean", "sd"])
        for some in comparison.sets:
            for metric, values in some.scores.items():
                for model, column, spread in zip(
                    comparison.models, values.T, _spread(values), strict=True
                ):
                    figures = [f"{column.mean():.6g}", f"{spread:.6g}"]
                    ranked = metric == PRIMARY[some.task]
                    row = [some.name, some.task, metric, ranked, model, len(column), *figures]
                    writer.writerow(row)


def plot_critical_difference(comparison: Comparison, path: Path) -> None:
    """Draw mean ranks on a line; bars join models that are not significantly apart."""
    matplotlib.rcParams["svg.hashsalt"] = "tabular"  # the same figures give the same file
    order = np.argsort(comparison.ranks.mean(axis=0), kind="stable")
    ranks = comparison.ranks.mean(axis=0)[order]
    labels = [comparison.models[at] for at in order]
    critical = comparison.critical_difference()
    bars = groups(list(ranks), critical)
    count = len(labels)
    depth = 1 + 0.35 * len(bars)
    figure = Figure(figsize=(8, 1.2 + 0.28 * (depth + (count + 1) // 2)))
    axes = figure.add_subplot()
    axes.set_xlim(0.3, count + 0.7)
    axes.set_ylim(-(depth + (count + 1) // 2), 2)
    axes.axis("off")
    axes.hlines(0, 1, count, color="black", linewidth=1)
    for tick in range(1, count + 1):
        axes.vlines(tick, 0, 0.15, color="black", linewidth=1)
        axes.text(tick, 0.25, str(tick), ha="center", va="bottom")
    for at, (label, rank) in enumerate(zip(labels, ranks, strict=True)):
        left = at < (count + 1) // 2
        line = -(depth + (at if left else count - 1 - at))
        edge = 0.9 if left else count + 0.1
        axes.plot([rank, rank, edge], [0, line, line], color="black", linewidth=0.8)
        axes.text(edge, line, f"{label} {rank:.2f}", ha="right" if left else "left", va="center")
    for at, (first, last) in enumerate(bars):
        level = -0.5 - 0.35 * at
        axes.hlines(level, ranks[first] - 0.04, ranks[last] + 0.04, color="C3", linewidth=4)
    axes.hlines(1.6, 1, 1 + critical, color="C0", linewidth=2)
    axes.text(1 + critical + 0.1, 1.6, f"critical difference {critical:.2f}", va="center")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def groups(ranks: Sequence[float], critical: float) -> list[tuple[int, int]]:
    """Return first and last of each longest run of ascending ranks within the difference."""
    reach = [
        (first, max(at for at, rank in enumerate(ranks) if rank - ranks[first] <= critical))
        for first in range(len(ranks))
    ]
    longest = [reach[0], *(later for before, later in pairwise(reach) if later[1] > before[1])]
    return [(first, last) for first, last in longest if last > first]
