#!/usr/bin/env python3
"""Train TabNSA on scikit-learn's own tables beside usual rivals, export, and score from bundles.

Run again, it reuses what is finished and says so.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from hashtab.features.errors import DataError
from hashtab.models.tabular.settings import NetworkSettings, TrainingSettings
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.leave import STOPPED, leave
from hashtab.pipelines.places import DEFAULT_TRACKING, python_script, shown, tracking_option
from hashtab.pipelines.promote import make_champion
from hashtab.pipelines.registry import Registry, find_bundle, register
from hashtab.pipelines.report import metrics_table, next_commands
from hashtab.pipelines.score_table import ScoreTableSettings, score
from hashtab.pipelines.table_bundles import load_estimator
from hashtab.pipelines.table_data import TableData, TableSettings, load
from hashtab.pipelines.table_metrics import metrics
from hashtab.pipelines.table_runs import TableRun, TableTrainSettings
from hashtab.pipelines.table_scoring import PREDICTION, PROBABILITY
from hashtab.pipelines.table_training import predictions
from hashtab.pipelines.train_tabnsa import bring_to_end, importances_table
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.table_bundle import TableBundle, largest_difference

_TABLES = {"breast_cancer": "diagnosis", "diabetes": "progression"}
_PATIENCE = 10_000  # steps, so that a logistic regression comes to its end


@dataclass(frozen=True, kw_only=True)
class DemoTabularSettings:
    """Settings of the demo.

    Args:
        data: folder that scikit-learn's tables are written to.
        network: what TabNSA is made of.
        training: how it is trained.
        seed: of the rows held out and of all models.
        storage: folder of all runs.
        tracking_uri: of MLflow.
    """

    data: str = "data/tabular"
    network: NetworkSettings = field(default_factory=NetworkSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    seed: int = 0
    storage: str = "runs"
    tracking_uri: str = DEFAULT_TRACKING


def write_tables(folder: Path) -> None:
    """Write scikit-learn's tables as CSV, as people have them."""
    folder.mkdir(parents=True, exist_ok=True)
    cancer, diabetes = load_breast_cancer(), load_diabetes(scaled=False)
    named = np.array(cancer.target_names)[cancer.target].astype(str)
    frame = pl.DataFrame(cancer.data, schema=[str(name) for name in cancer.feature_names])
    frame.with_columns(pl.Series(_TABLES["breast_cancer"], named)).write_csv(
        folder / "breast_cancer.csv"
    )
    frame = pl.DataFrame(diabetes.data, schema=list(diabetes.feature_names))
    sex = pl.when(pl.col("sex") == 1).then(pl.lit("a")).otherwise(pl.lit("b"))
    target = pl.Series(_TABLES["diabetes"], diabetes.target)
    frame.with_columns(sex.alias("sex"), target).write_csv(folder / "diabetes.csv")


def train(name: str, settings: DemoTabularSettings) -> tuple[TableRun, TableData]:
    """Return the run of a table, trained to its end, and what it learnt from."""
    file = Path(settings.data) / f"{name}.csv"
    chosen = TableTrainSettings(
        data=TableSettings(file=str(file), target=_TABLES[name]),
        network=settings.network,
        training=settings.training,
        seed=settings.seed,
        storage=settings.storage,
        tracking_uri=settings.tracking_uri,
    )
    data = load(chosen.data, chosen.seed)
    run = TableRun.find(chosen, data)
    if run.published:
        print(f"{name}: trained before, reused from {shown(run.folder)}", file=sys.stderr)
    else:
        print(f"{name}: training", file=sys.stderr)
        bring_to_end(run, data)
    return run, data


def rivals(data: TableData, seed: int) -> dict[str, dict[str, float]]:
    """Return the test metrics of scikit-learn's models on the same rows."""
    if data.task == "classification":
        models: dict[str, BaseEstimator] = {
            "logistic regression": LogisticRegression(max_iter=_PATIENCE),
            "gradient boosting": HistGradientBoostingClassifier(random_state=seed),
        }
    else:
        models = {
            "ridge regression": RidgeCV(np.logspace(-3, 3, 13)),
            "gradient boosting": HistGradientBoostingRegressor(random_state=seed),
        }
    train, test = (_as_numbers(table.frame) for table in (data.train, data.test))
    found = {}
    for name, model in models.items():
        with threadpool_limits(1):  # threads that wait for each other cost more than these tables
            fitted = make_pipeline(StandardScaler(), model).fit(train, data.train.target)
        classes = getattr(fitted, "classes_", None)
        predicted = fitted.predict(test) if classes is None else fitted.predict_proba(test)
        found[name] = metrics(data.test.target, predicted, classes)
    return found


def _as_numbers(frame: pl.DataFrame) -> NDArray[np.float64]:
    """Text as truth values, which does for the demo's one column of two letters."""
    text = [name for name, dtype in frame.schema.items() if dtype == pl.String]
    return frame.with_columns((pl.col(name) == "a").cast(pl.Float64) for name in text).to_numpy()


def served(run: TableRun, data: TableData, name: str, settings: DemoTabularSettings) -> list[str]:
    """Register a run's bundle, make it champion, score the held-out rows with it, and compare."""
    uri = settings.tracking_uri
    model = f"hashtab-{name}"
    # The demo shows the model that it has just trained, whatever was registered before.
    make_champion(Registry(uri, model), register(run.bundle, model, uri, run.tracked_as))
    champion = f"models:/{model}@champion"
    bundle = TableBundle.open(find_bundle(champion, uri))
    output = run.folder / f"scores-{bundle.manifest.digest[:8]}"
    score(
        ScoreTableSettings(
            bundle=champion, rows=str(run.held_out), output=str(output), tracking_uri=uri
        )
    )
    scores = pl.read_parquet(output / "part-*.parquet")
    columns = [f"{PROBABILITY}_{label}" for label in bundle.manifest.classes] or PREDICTION
    torch = predictions(load_estimator(run.model), data.test)
    difference = largest_difference(scores[columns].to_numpy(), torch)
    one = milliseconds(bundle, run.held_out)
    return [
        f"{len(scores):,} rows scored from {champion} and torch's differ by {difference:.1g} at "
        f"most; one row takes {one:.2f} ms in one thread",
        f"scores in {shown(output)}",
    ]


def milliseconds(bundle: TableBundle, file: Path, calls: int = 200) -> float:
    """Return the median time of scoring one row, given as a mapping."""
    rows = pl.read_parquet(file).head(1).to_dicts()
    spent = []
    for _ in range(calls):
        begun = time.perf_counter()
        bundle.score(rows)
        spent.append(time.perf_counter() - begun)
    return float(np.median(spent)) * 1e3


def show(settings: DemoTabularSettings) -> str:
    """Bring both tables to their ends and return what to print."""
    write_tables(Path(settings.data))
    lines: list[str] = []
    for name in _TABLES:
        run, data = train(name, settings)
        found = rivals(data, settings.seed) | {"TabNSA": run.result.metrics["test"]}
        rows = run.result.rows
        lines += [
            "",
            f"{name}: {rows['train']} rows of {run.result.columns} columns, {rows['test']} held "
            f"out, TabNSA in {run.result.seconds:.0f} s",
            "",
            metrics_table(found, "test"),
            "",
            importances_table(run.result.importances),
            "",
            *served(run, data, name, settings),
            f"run, bundle and plots in {shown(run.folder)}",
        ]
    tracked = tracking_option(settings.tracking_uri)
    own = f"{python_script('train_tabnsa.py')} --data.file my.csv --data.target my_column{tracked}"
    return "\n".join(
        [
            *lines,
            "",
            *next_commands(settings.tracking_uri),
            "  train on your own table:",
            f"    {own}",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse, show; bad settings end with one line and exit code 2."""
    try:
        text = show(parse(DemoTabularSettings, arguments, __doc__))
    except (SettingsError, DataError, BundleError, RequestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    print(text)
    return 0


if __name__ == "__main__":
    leave(main())
