"""The parity gate of tables: a fitted estimator in torch against its bundle in onnxruntime."""

from collections.abc import Iterator

import numpy as np
import polars as pl

from hashtab.pipelines.table_data import spread
from hashtab.pipelines.table_graph import Estimator, torch_outputs
from hashtab.serving.errors import BundleError
from hashtab.serving.table_bundle import TableBundle, largest_difference
from hashtab.serving.table_manifest import Column, TableParity

TOLERANCE = 1e-5
_UNSEEN = "n\u00e4mli\u010d, never seen"  # text outside ASCII, which no encoding may alter
_NUMBERS = (None, np.inf, -np.inf, 0.0, 1e30, -1e30)


def check_parity(estimator: Estimator, bundle: TableBundle, sample: pl.DataFrame) -> TableParity:
    """Hold every prediction of the bundle against that of the estimator.

    Raises:
        BundleError: if two predictions differ by more than 1e-5 (of a regression, of the largest
            prediction where that is above 1), or one is no finite number.
    """
    compared, largest = 0, 0.0
    for name, rows in cases(sample, bundle.manifest.columns):
        served = bundle.raw(rows)
        expected = _expected(estimator, rows)
        if served.shape != expected.shape or not np.isfinite(expected).all():
            raise BundleError(
                f"torch gives {expected.shape} with {int((~np.isfinite(expected)).sum())} numbers "
                f"that are not finite, onnxruntime {served.shape} ({name}): nothing was exported"
            )
        difference = largest_difference(served, expected)
        if not difference <= TOLERANCE:
            raise BundleError(
                f"onnxruntime and torch differ by {difference:.2g} in the prediction of a row "
                f"({name}), more than {TOLERANCE:g}: nothing was exported"
            )
        compared, largest = compared + len(rows), max(largest, difference)
    return TableParity(rows=compared, largest_difference=largest)


def cases(sample: pl.DataFrame, columns: tuple[Column, ...]) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield tables of real rows, and of those that go wrong first.

    Hard ones: no row, one row, each number missing, infinite and huge in turn, each category
    missing and unseen in turn, and all of a row missing.

    Args:
        sample: real rows, at least one.
        columns: that the model reads.
    """
    yield "real rows", sample
    yield "one row", sample.head(1)
    yield "no row", sample.head(0)
    for column in columns:
        values = _NUMBERS if column.numeric else (None, _UNSEEN)
        dtype = pl.Float64 if column.numeric else pl.String
        hard = pl.Series(column.name, values, dtype)
        rows = sample[spread(len(sample), len(values))]
        yield f"{column.name!r} missing, infinite, huge or unseen", rows.with_columns(hard)
    nothing = [
        pl.lit(None, pl.Float64 if column.numeric else pl.String).alias(column.name)
        for column in columns
    ]
    yield "all missing", sample.head(1).with_columns(nothing)


def _expected(estimator: Estimator, rows: pl.DataFrame) -> np.ndarray:
    """Return what the estimator itself predicts; of no rows, what its module does."""
    table = estimator.table_
    if not len(rows):
        numeric, categorical = len(table.numeric), len(table.categorical)
        return torch_outputs(estimator, np.empty((0, numeric)), np.empty((0, categorical), object))
    predict = estimator.predict_proba if hasattr(estimator, "classes_") else estimator.predict
    return np.asarray(predict(rows))
