"""TabNSA carried from one table to another that shares some of its columns: is it worth it?

A set's columns are shuffled and cut into two overlapping tables, A the first two thirds and B the
last two thirds; its rows (at most `--rows`) into two disjoint halves. A source is fitted on A and
the first half. Then few rows of the second half, seen through B, are fitted from scratch, with
`warm_start_from` the source, and with `freeze_backbone` too, by the same settings, rows and seed.
The score is the AUC on the rows of the second half that no budget holds, the same for all. A gain
is paired by seed (columns, rows and weights are drawn anew for each); mean, standard deviation over
seeds and seeds won.

    python experiments/tabular_transfer.py --data FOLDER [--sets credit-g] [--seeds 5]
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from experiments.tabular_benchmark.data import Array, Table, load
from hashtab.models.tabular import TabNSAClassifier

SETS = ("credit-g", "blastchar", "adult", "bank-marketing", "diabetes")
BUDGETS = (50, 100, 200, 400)
LEAST_TESTED = 100
WAYS = ("scratch", "warm", "frozen")


@dataclass(frozen=True)
class Part:
    """Rows of one table with their target."""

    features: pd.DataFrame
    target: Array

    def take(self, rows: slice) -> "Part":
        return Part(self.features.iloc[rows], self.target[rows])


def halves(table: Table, rows: int, seed: int) -> tuple[Part, Part]:
    """Return the source's table and the target's: other rows, a third of the columns shared."""
    columns = np.random.default_rng(seed).permutation(table.features.columns)
    shown = np.arange(len(table.target))
    if rows < len(shown):
        shown, _ = train_test_split(
            shown, train_size=rows, stratify=table.target, random_state=seed
        )
    first, second = train_test_split(
        shown, test_size=0.5, stratify=table.target[shown], random_state=seed
    )
    third = len(columns) // 3
    source = table.features[columns[: len(columns) - third]]
    target = table.features[columns[third:]]
    return (
        Part(source.iloc[first], table.target[first]),
        Part(target.iloc[second], table.target[second]),
    )


def scores(table: Table, budgets: list[int], seed: int, settings: argparse.Namespace) -> Array:
    """Return AUC `[budgets, ways]`."""
    source, target = halves(table, settings.rows, seed)
    tested = target.take(slice(max(budgets), None))

    def estimator() -> TabNSAClassifier:
        return TabNSAClassifier(folds=settings.folds, random_state=seed, device="cpu", n_jobs=1)

    before = estimator().fit(source.features, source.target)
    found = np.empty((len(budgets), len(WAYS)))
    for i, budget in enumerate(budgets):
        few = target.take(slice(budget))
        for j, way in enumerate(WAYS):
            fitted = estimator().fit(
                few.features,
                few.target,
                warm_start_from=None if way == "scratch" else before,
                freeze_backbone=way == "frozen",
            )
            predicted = fitted.predict_proba(tested.features)[:, 1]
            found[i, j] = roc_auc_score(tested.target, predicted)
    return found


def compare(table: Table, settings: argparse.Namespace) -> None:
    """Print the lines of one set."""
    half = min(settings.rows, len(table.target)) // 2
    budgets = [budget for budget in BUDGETS if budget + LEAST_TESTED <= half]
    found = np.stack([scores(table, budgets, seed, settings) for seed in range(settings.seeds)])
    columns = table.features.shape[1]
    for i, budget in enumerate(budgets):
        scratch = found[:, i, 0]
        cells = [f"{scratch.mean():.3f} ± {scratch.std(ddof=1):.3f}"]
        for way in (1, 2):
            gain = found[:, i, way] - scratch
            won = f"{(gain > 0).sum()}/{len(gain)}"
            cells.append(f"{gain.mean():+.3f} ± {gain.std(ddof=1):.3f} ({won})")
        tested = half - max(budgets)
        print(
            f"{table.name:<16}{columns:>5}{half:>7,}{budget:>7}{tested:>7,}"
            f"{cells[0]:>16}{cells[1]:>23}{cells[2]:>23}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmark's tables")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=3_000, help="of a set, at most")
    parser.add_argument("--folds", type=int, default=2, help="networks of a fit")
    settings = parser.parse_args()
    print(f"seeds={settings.seeds}, rows={settings.rows}, folds={settings.folds}; AUC\n")
    print(
        f"{'set':<16}{'cols':>5}{'source':>7}{'fitted':>7}{'tested':>7}"
        f"{'scratch':>16}{'warm gain (won)':>23}{'frozen gain (won)':>23}"
    )
    for name in settings.sets:
        compare(load(settings.data, name), settings)


if __name__ == "__main__":
    main()
