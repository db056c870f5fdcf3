"""How well a table is predicted: metrics, losses row by row, and what each column is worth."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    log_loss,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)

from hashtab.features.metrics import calibration_error
from hashtab.pipelines.table_data import LabelledTable
from hashtab.serving.table_bundle import TableBundle

_LEAST = 1e-7  # keeps the loss of a float32 probability that rounds to 0 finite
_REPEATS, _MOST_ROWS, _MOST_CELLS = 3, 1000, 100_000

Labels = NDArray[Any]


def metrics(
    target: Labels,
    predicted: NDArray[Any],
    classes: Labels | None,
    quantiles: Sequence[float] = (),
) -> dict[str, float]:
    """Return all metrics by name; those that are undefined are left out.

    Args:
        target: `[N]`, labels or numbers.
        predicted: probabilities `[N, K]` in the order of the classes, values `[N]`, or quantiles
            `[N, Q]`, `[N]` for one of them.
        classes: `[K]`; None of a regression.
        quantiles: `[Q]`; none where means are predicted. `coverage` is the share of rows between
            the outer two.
    """
    if quantiles:
        found = {"pinball_loss": losses(target, predicted, None, quantiles).mean()}
        if len(quantiles) > 1:
            inside = (predicted[:, 0] <= target) & (target <= predicted[:, -1])
            found["coverage"] = inside.mean()
    elif classes is None:
        found = {
            "rmse": root_mean_squared_error(target, predicted),
            "mae": mean_absolute_error(target, predicted),
            "r2": r2_score(target, predicted),
        }
    else:
        likeliest, sure = classes[predicted.argmax(1)], predicted.max(1)
        binary = len(classes) == 2
        labels = target == classes[1] if binary else likeliest == target
        found = {
            "auc": _auc(target, predicted, classes),
            "log_loss": log_loss(target, _proper(predicted), labels=classes),
            "accuracy": accuracy_score(target, likeliest),
            "calibration_error": calibration_error(labels, predicted[:, 1] if binary else sure),
        }
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _auc(target: Labels, predicted: NDArray[Any], classes: Labels) -> float:
    """Of two classes the usual one; of more the mean of each against the rest."""
    if len(np.unique(target)) < len(classes):
        return float("nan")
    if len(classes) == 2:
        return float(roc_auc_score(target == classes[1], predicted[:, 1]))
    each = [roc_auc_score(target == label, predicted[:, i]) for i, label in enumerate(classes)]
    return float(np.mean(each))


def _proper(predicted: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities that add up to one in float64 too."""
    clipped = np.clip(predicted.astype(np.float64), _LEAST, 1 - _LEAST)
    proper: NDArray[np.float64] = clipped / clipped.sum(1, keepdims=True)
    return proper


def losses(
    target: Labels,
    predicted: NDArray[Any],
    classes: Labels | None,
    quantiles: Sequence[float] = (),
) -> NDArray[np.float64]:
    """Return the loss of each row `[N]`: log loss, squared error, or the quantiles' mean pinball.

    Args as of `metrics`.
    """
    if quantiles:
        error = target[:, None] - predicted.reshape(len(target), len(quantiles)).astype(np.float64)
        pinball: NDArray[np.float64] = np.maximum(
            np.multiply(quantiles, error), np.subtract(quantiles, 1) * error
        ).mean(1)
        return pinball
    if classes is None:
        squared: NDArray[np.float64] = (target - predicted.astype(np.float64)) ** 2
        return squared
    place = {label: i for i, label in enumerate(classes.tolist())}
    chosen = _proper(predicted)[np.arange(len(target)), [place[v] for v in target.tolist()]]
    loss: NDArray[np.float64] = -np.log(chosen)
    return loss


def importances(bundle: TableBundle, table: LabelledTable, seed: int) -> dict[str, float]:
    """Return by column how much the mean loss grows when its values are shuffled, largest first.

    Columns that say the same share their worth: shuffled alone, neither is missed.

    Args:
        bundle: that predicts.
        table: rows that it did not learn from.
        seed: of the rows used and of shuffling.
    """
    random = np.random.default_rng(seed)
    most = min(_MOST_ROWS, max(100, _MOST_CELLS // len(bundle.manifest.columns)))
    table = table.take(np.sort(random.permutation(len(table))[:most]))
    classes = bundle.labels if bundle.manifest.classes else None
    quantiles = bundle.manifest.quantiles
    usual = losses(table.target, bundle.raw(table.frame), classes, quantiles).mean()
    found = {}
    for name in table.frame.columns:
        grown = []
        for _ in range(_REPEATS):
            shuffled = table.frame[name].gather(random.permutation(len(table)))
            predicted = bundle.raw(table.frame.with_columns(shuffled))
            grown.append(losses(table.target, predicted, classes, quantiles).mean() - usual)
        found[name] = float(np.mean(grown))
    return dict(sorted(found.items(), key=lambda item: -item[1]))
