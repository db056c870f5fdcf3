"""What serving a table costs without torch: one row, 256 rows, and the size of the file.

`python experiments/bench_tabular_serving.py` needs no data: tables are random and models hardly
trained, since time depends on neither values nor weights. All run in one thread. "graph" is the
runtime on matrices that are there; "call" begins with mappings of raw values, as a service has
them. Rivals run beside: the estimator in torch, and scikit-learn's gradient boosting.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.models.tabular.settings import NetworkSettings, TrainingSettings
from hashtab.pipelines.table_bundles import export_table, save_estimator
from hashtab.pipelines.table_data import TableSettings, load
from hashtab.pipelines.table_runs import TableTrainSettings
from hashtab.pipelines.table_training import fit
from hashtab.serving.table_bundle import TableBundle
from hashtab.serving.table_columns import matrices

ROWS, MANY, LEVELS = 2000, 256, 12
TABLES = {  # numbers and categories
    "10 numbers": (10, 0),
    "6 numbers, 8 categories": (6, 8),
    "30 numbers": (30, 0),
    "100 numbers": (100, 0),
}
SETTINGS = {
    "8 networks": (NetworkSettings(), TrainingSettings(max_epochs=1)),
    "1 network": (NetworkSettings(), TrainingSettings(max_epochs=1, folds=1)),
}


def make(folder: Path, numbers: int, categories: int) -> TableTrainSettings:
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    columns = {f"n{i}": random.normal(size=ROWS) for i in range(numbers)}
    levels = np.array([f"level {i}" for i in range(LEVELS)])
    text = {f"c{i}": levels[random.integers(0, LEVELS, ROWS)] for i in range(categories)}
    pl.DataFrame({**columns, **text, "y": random.integers(0, 2, ROWS)}).write_parquet(
        folder / "table.parquet"
    )
    return TableTrainSettings(data=TableSettings(file=str(folder / "table.parquet"), target="y"))


def milliseconds(work: Callable[[], object], seconds: float = 2.0) -> tuple[float, float]:
    """Return median and 99th percentile of one call."""
    for _ in range(5):
        work()
    spent: list[float] = []
    while sum(spent) < seconds:
        begun = time.perf_counter()
        work()
        spent.append(time.perf_counter() - begun)
    return float(np.median(spent)) * 1e3, float(np.percentile(spent, 99)) * 1e3


def measure(folder: Path, settings: TableTrainSettings, name: str) -> None:
    data = load(settings.data, settings.seed)
    estimator = fit(settings, data)
    (folder / "model").mkdir(parents=True)
    save_estimator(folder / "model", estimator, data, "y")
    export_table(folder / "model", folder / "bundle", {})
    bundle = TableBundle.open(folder / "bundle")
    size = (folder / "bundle" / bundle.graph).stat().st_size / 1e6
    found = []
    for count in (1, MANY):
        frame = data.train.frame.head(count)
        inputs, rows = matrices(frame, bundle.manifest.columns), frame.to_dicts()
        graph, p99 = milliseconds(partial(bundle.run, inputs))
        call, _ = milliseconds(partial(bundle.predict_proba, rows))
        in_torch, _ = milliseconds(partial(estimator.predict_proba, frame))
        found.append(f"{graph:7.2f} {p99:7.2f} {call:7.2f} {in_torch:7.2f} {in_torch / call:6.1f}")
    print(f"{name:<38} {size:6.2f} |" + " |".join(found))


def boosting(settings: TableTrainSettings, name: str) -> None:
    """Measure gradient boosting on a table of numbers."""
    data = load(settings.data, settings.seed)
    model = HistGradientBoostingClassifier().fit(data.train.frame.to_numpy(), data.train.target)
    found = []
    for count in (1, MANY):
        rows = data.train.frame.head(count).to_numpy()
        call, p99 = milliseconds(partial(model.predict_proba, rows))
        found.append(f"{'-':>7} {p99:7.2f} {call:7.2f} {'-':>7} {'-':>6}")
    print(f"{name:<38} {'-':>6} |" + " |".join(found))


def main() -> None:
    torch.set_num_threads(1)
    part = "  graph     p99    call   torch  ratio"
    print(f"{'ms in one thread':<38} {'MB':>6} |{'one row':^38} |{f'{MANY} rows':^38}")
    print(f"{'':<38} {'':>6} |{part} |{part}")
    with tempfile.TemporaryDirectory() as name, threadpool_limits(1):
        work = Path(name)
        for table, (numbers, categories) in TABLES.items():
            settings = make(work / table, numbers, categories)
            for model, (network, training) in SETTINGS.items():
                chosen = replace(settings, network=network, training=training)
                measure(work / table / model, chosen, f"{table}, {model}")
            if not categories:
                boosting(settings, f"{table}, gradient boosting")


if __name__ == "__main__":
    main()
