"""Scores of one test part, and which of them a task is ranked by."""

import numpy as np
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score, root_mean_squared_error

from experiments.tabular_benchmark.data import Array, Task

PRIMARY: dict[Task, str] = {"binary": "auc", "multiclass": "log_loss", "regression": "rmse"}
HIGHER_IS_BETTER = frozenset({"auc", "accuracy"})


def scores(task: Task, target: Array, predicted: Array) -> dict[str, float]:
    """Return AUC (several classes: one against one, macro), log loss and accuracy, or RMSE.

    Args:
        task: of the set.
        target: `[N]`, class numbers or values.
        predicted: `[N, classes]` probabilities or `[N]` values.

    Raises:
        ValueError: for predictions that are not finite.
    """
    predicted = np.asarray(predicted, np.float64)
    if not np.isfinite(predicted).all():
        raise ValueError("the model predicts values that are not finite")
    if task == "regression":
        return {"rmse": float(root_mean_squared_error(target, predicted))}
    predicted = predicted / predicted.sum(axis=1, keepdims=True)
    labels = np.arange(predicted.shape[1])
    if task == "binary":
        area = roc_auc_score(target, predicted[:, 1])
    else:
        area = roc_auc_score(target, predicted, multi_class="ovo", labels=labels)
    return {
        "auc": float(area),
        "log_loss": float(log_loss(target, predicted, labels=labels)),
        "accuracy": float(accuracy_score(target, predicted.argmax(axis=1))),
    }


def loss(metric: str, value: float) -> float:
    """Return a score turned so that less is better."""
    return -value if metric in HIGHER_IS_BETTER else value
