"""Runs: which are due, in which order, and what one of them does."""

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from experiments.tabular_benchmark.data import Table, load
from experiments.tabular_benchmark.metrics import PRIMARY, loss, scores
from experiments.tabular_benchmark.models import MODELS, Model, Part, Setting
from experiments.tabular_benchmark.search_space import Params, draw
from experiments.tabular_benchmark.splits import Split, make_splits, verify
from experiments.tabular_benchmark.store import Key, Record, Store


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How runs are made.

    Args:
        data: folder of the parquet files and MANIFEST.json.
        trials: draws of the tuned track, the defaults among them.
        budget_seconds: wall time after which a tuned run begins no new trial.
        threads: of each model.
        devices: dealt to runs in turn.
    """

    data: Path
    trials: int = 20
    budget_seconds: float = 600.0
    threads: int = 1
    devices: tuple[str, ...] = ("cpu",)


def due(
    data: Path,
    sets: Sequence[str],
    models: Sequence[str],
    track: str,
    max_splits: int | None = None,
) -> list[Key]:
    """Return all runs, splits first, then sets, then models: stopping early keeps them paired.

    Raises:
        DataError: when data or splits are not those of splits.json.
    """
    names: dict[str, list[str]] = {}
    for name in sets:
        table = load(data, name)
        verify(table)
        names[name] = [split.name for split in make_splits(table)][:max_splits]
    return [
        Key(name, names[name][index], model, track)
        for index in range(max(map(len, names.values()), default=0))
        for name in sets
        if index < len(names[name])
        for model in models
    ]


def execute(keys: Sequence[Key], store: Store, settings: RunSettings, workers: int = 1) -> int:
    """Make the runs that the store lacks; print a line for each; return how many failed."""
    missing = [key for key in keys if key not in store.done]
    print(f"{len(keys)} runs, {len(keys) - len(missing)} of them done before", flush=True)
    failed = 0
    for key, outcome in _outcomes(missing, settings, workers):
        try:
            record = outcome.result()
        except Exception as error:  # any model's; the others go on, and a rerun tries it again
            failed += 1
            print(f"{' '.join(key)}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        store.add(record)
        metric = PRIMARY[record.task]
        print(
            f"{' '.join(key):<48}{metric} {record.metrics[metric]:.4f}{record.fit_seconds:>9.1f} s",
            flush=True,
        )
    return failed


def _outcomes(
    keys: Sequence[Key], settings: RunSettings, workers: int
) -> Iterator[tuple[Key, Future[Record]]]:
    tasks = {
        key: partial(run, key, settings, settings.devices[number % len(settings.devices)])
        for number, key in enumerate(keys)
    }
    if workers == 1:
        for key, task in tasks.items():
            outcome: Future[Record] = Future()
            try:
                outcome.set_result(task())
            except Exception as error:
                outcome.set_exception(error)
            yield key, outcome
        return
    # spawn: a fork would copy the locks of threads that it does not copy.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(task): key for key, task in tasks.items()}
        for future in as_completed(futures):
            yield futures[future], future


def run(key: Key, settings: RunSettings, device: str = "cpu") -> Record:
    """Make one run: choose on inner validation, fit, and read the test part once."""
    table = _table(settings.data, key.set)
    split = {some.name: some for some in make_splits(table)}[key.split]
    setting = Setting(table.task, table.classes, split.index, settings.threads, device)
    begun, begun_process = time.perf_counter(), time.process_time()
    if key.track == "tuned":
        chosen = _tune(table, split, key.model, setting, settings)
    else:
        chosen = _Trial(_fit(table, split, key.model, setting, {}, final=True), {}, None, 1)
    fitted, fitted_process = time.perf_counter(), time.process_time()
    predicted = chosen.model.predict(table.features.iloc[split.test])
    predicted_at = time.perf_counter()
    validation = chosen.validation
    if validation is None and MODELS[key.model].validates:
        validation = _validation_score(table, split, chosen.model)
    return Record(
        *key,
        task=table.task,
        split_hash=split.digest,
        metrics=scores(table.task, table.target[split.test], predicted),
        validation=validation,
        params=dict(chosen.params),
        trials=chosen.trials,
        fit_seconds=round(fitted - begun, 3),
        fit_process_seconds=round(fitted_process - begun_process, 3),
        predict_seconds=round(predicted_at - fitted, 4),
        threads=settings.threads,
        device=device,
        versions=MODELS[key.model].versions(),
    )


@dataclass(frozen=True)
class _Trial:
    model: Model
    params: Params
    validation: float | None
    trials: int


def _tune(table: Table, split: Split, name: str, setting: Setting, settings: RunSettings) -> _Trial:
    """Return the trial of the best inner validation score; it never sees the test part."""
    metric = PRIMARY[table.task]
    end = time.perf_counter() + settings.budget_seconds
    best: _Trial | None = None
    trials = 0
    while trials < settings.trials and (best is None or time.perf_counter() < end):
        params = draw(name, trials, split.index)
        model = _fit(table, split, name, setting, params, final=False)
        found = _validation_score(table, split, model)
        trials += 1
        if (
            best is None
            or best.validation is None
            or loss(metric, found) < loss(metric, best.validation)
        ):
            best = _Trial(model, params, found, trials)
    assert best is not None
    model = best.model
    if not MODELS[name].validates:  # the rows that chose are its to learn from in the end
        model = _fit(table, split, name, setting, best.params, final=True)
    return _Trial(model, best.params, best.validation, trials)


def _fit(
    table: Table, split: Split, name: str, setting: Setting, params: Params, *, final: bool
) -> Model:
    """Fit one model; a `final` one that stops without validation learns from all training rows."""
    entry = MODELS[name]
    model = entry.make(setting, params)
    if entry.validates:
        model.fit(_part(table, split.fit), _part(table, split.inner))
    else:
        model.fit(_part(table, split.train if final else split.fit), None)
    return model


def _validation_score(table: Table, split: Split, model: Model) -> float:
    predicted = model.predict(table.features.iloc[split.inner])
    return scores(table.task, table.target[split.inner], predicted)[PRIMARY[table.task]]


def _part(table: Table, rows: np.ndarray) -> Part:
    """Cut rows out; categories that they lack are forgotten, as nobody could know them."""
    features = table.features.iloc[rows]
    known = {
        name: features[name].cat.remove_unused_categories()
        for name in features.select_dtypes("category").columns
    }
    return Part(features.assign(**known), table.target[rows])


@lru_cache(maxsize=2)
def _table(data: Path, name: str) -> Table:
    return load(data, name)
