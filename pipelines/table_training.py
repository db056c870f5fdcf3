"""One training on a table: fit, test, export, and the plots of what came out."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from hashtab.pipelines.table_bundles import ESTIMATORS, export_table, save_estimator
from hashtab.pipelines.table_data import LabelledTable, TableData, Task, latest
from hashtab.pipelines.table_graph import Estimator
from hashtab.pipelines.table_metrics import importances, metrics
from hashtab.pipelines.table_plots import explanations, plot_table_run
from hashtab.pipelines.table_runs import TableResult, TableRun, TableTrainSettings
from hashtab.serving.table_bundle import TableBundle


def fit(settings: TableTrainSettings, data: TableData, *, verbose: int = 0) -> Estimator:
    """Fit an estimator on the rows to learn from.

    Where rows are in time order it validates on the latest of them, else as it chooses itself.
    """
    estimator = make_estimator(settings, data.task, data.categorical, verbose=verbose)
    if data.quantiles:
        estimator.set_params(quantiles=list(data.quantiles))
    if not data.ordered:
        return estimator.fit(data.train.frame, data.train.target)
    early, late = latest(data.train)
    return estimator.fit(early.frame, early.target, eval_set=(late.frame, late.target))


def make_estimator(
    settings: TableTrainSettings, task: Task, categorical: Sequence[str], *, verbose: int = 0
) -> Estimator:
    """Return an estimator of these settings that is not fitted yet."""
    return ESTIMATORS[task](
        **vars(settings.network),
        **vars(settings.training),
        categorical_features=list(categorical) or None,
        random_state=settings.seed,
        n_jobs=settings.threads,
        verbose=verbose,
    )


def predictions(estimator: Estimator, table: LabelledTable) -> NDArray[Any]:
    """Return probabilities `[N, K]`, values `[N]`, or several quantiles `[N, Q]`."""
    classifies = hasattr(estimator, "classes_")
    predict = estimator.predict_proba if classifies else estimator.predict
    return np.asarray(predict(table.frame))


def train_run(run: TableRun, data: TableData) -> None:
    """Train a run to its end: model, bundle, result and plots in its folder.

    Raises:
        BundleError: if torch and onnxruntime disagree.
    """
    begun, settings = time.perf_counter(), run.settings
    estimator = fit(settings, data, verbose=int(sys.stderr.isatty()))
    seconds = time.perf_counter() - begun
    classes = getattr(estimator, "classes_", None)
    predicted = predictions(estimator, data.test)
    found = {"test": metrics(data.test.target, predicted, classes, data.quantiles)}
    for folder in (run.model, run.bundle):  # of a training that was stopped
        shutil.rmtree(folder, ignore_errors=True)
    run.model.mkdir(parents=True)
    save_estimator(run.model, estimator, data, str(settings.data.target))
    export_table(run.model, run.bundle, found)
    write_held_out(run, data)
    result = TableResult(
        name=run.name,
        metrics=found,
        curves=curves(getattr(estimator, "history_", ())),
        importances=importances(TableBundle.open(run.bundle), data.test, settings.seed),
        rows={"train": len(data.train), "test": len(data.test)},
        columns=len(data.columns),
        seconds=seconds,
    )
    plot_table_run(result, data.test.target, predicted, classes, run.plots)
    if settings.network.columns == "own":  # tokens that columns share cannot be explained by them
        explanations(estimator, data.test.frame, result, run.plots / "explanations.png")
    run.finish(result)


def write_held_out(run: TableRun, data: TableData) -> None:
    """Write the rows that were held out, with their target, as a labelled table of their own."""
    target = pl.Series(run.settings.data.target, data.test.target)
    data.test.frame.with_columns(target).write_parquet(run.held_out)


def curves(history: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], ...]:
    """Return the numbers of each epoch by name, all but its own."""
    return tuple(
        {
            name: float(value)
            for name, value in epoch.items()
            if name != "epoch" and isinstance(value, int | float)
        }
        for epoch in history
    )
