"""Metrics of click models, exact on ties: AUC, gAUC, log loss, calibration error, and by slice."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

HISTORY_EDGES = (1, 50, 200, 500, 1000, 2000)
_HISTORY_NAMES = (
    "history_0",
    *(f"history_{low}_{high - 1}" for low, high in pairwise(HISTORY_EDGES)),
    f"history_{HISTORY_EDGES[-1]}_up",
)
CALIBRATION_BINS = 20
# Keeps the loss of a float32 sigmoid that rounds to 0 or 1 finite.
_SMALLEST_PROBABILITY = 1e-7


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties counting half.

    Args:
        labels: `[Q]` in {0, 1}.
        scores: `[Q]`, any scale.

    Returns:
        NaN where there is one class only.
    """
    return gauc(labels, scores, np.zeros(np.shape(labels), np.int64))


def gauc(labels: ArrayLike, scores: ArrayLike, users: ArrayLike) -> float:
    """AUC per user, weighted by the user's samples; users with one class are left out.

    Args:
        labels: `[Q]` in {0, 1}.
        scores: `[Q]`, any scale.
        users: `[Q]`, any order.

    Returns:
        NaN where no user has both classes.
    """
    by_user, samples = user_aucs(labels, scores, users)
    both = ~np.isnan(by_user)
    return float(np.average(by_user[both], weights=samples[both])) if both.any() else float("nan")


def user_aucs(
    labels: ArrayLike, scores: ArrayLike, users: ArrayLike
) -> tuple[Floats, NDArray[np.int64]]:
    """AUC of each user, in the order of the users' values, and how many samples it is of.

    Args:
        labels: `[Q]` in {0, 1}.
        scores: `[Q]`, any scale.
        users: `[Q]`, any order.

    Returns:
        AUC, NaN for a user with one class only, and samples, both one a user.
    """
    label, score, user = np.asarray(labels), np.asarray(scores), np.asarray(users)
    order = np.lexsort((score, user))
    label, score, user = label[order].astype(np.float64), score[order], user[order]
    if not len(label):
        return np.empty(0), np.empty(0, np.int64)
    starts = _run_starts(user[1:] != user[:-1])
    sizes = np.diff(starts, append=len(label))
    ranks = _average_ranks(score, user) - np.repeat(starts, sizes)
    positives = np.add.reduceat(label, starts)
    negatives = sizes - positives
    pairs = positives * negatives
    won = np.add.reduceat(ranks * label, starts) - positives * (positives + 1) / 2
    return np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan), sizes


def _run_starts(changes: Mask) -> NDArray[np.int64]:
    return np.concatenate([[0], np.flatnonzero(changes) + 1])


def _average_ranks(score: NDArray[Any], user: NDArray[Any]) -> Floats:
    """Ranks from 1 over all rows sorted by user and score; equal scores of a user share theirs."""
    starts = _run_starts((score[1:] != score[:-1]) | (user[1:] != user[:-1]))
    ends = np.append(starts[1:], len(score))
    return np.repeat((starts + 1 + ends) / 2, ends - starts)


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean negative log-likelihood in nats; probabilities are kept 1e-7 away from 0 and 1."""
    label = np.asarray(labels, np.float64)
    p = np.asarray(probabilities, np.float64)
    p = np.clip(p, _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
    return float(-np.mean(label * np.log(p) + (1 - label) * np.log1p(-p)))


def calibration_error(
    labels: ArrayLike, probabilities: ArrayLike, bins: int = CALIBRATION_BINS
) -> float:
    """Expected calibration error: mean |rate - predicted| over equally wide bins, by samples."""
    label = np.asarray(labels, np.float64)
    p = np.asarray(probabilities, np.float64)
    bin_of = np.minimum((p * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(bin_of, weights=label - p, minlength=bins)
    return float(np.abs(gaps).sum() / len(label))


def standard_slices(history_lengths: ArrayLike, item_counts: ArrayLike) -> dict[str, Mask]:
    """Masks `[Q]` by history length and by whether the user had met the item before.

    Args:
        history_lengths: `[Q]` behaviours before the request.
        item_counts: `[Q]` times the user had met the item before the request.
    """
    lengths, counts = np.asarray(history_lengths), np.asarray(item_counts)
    bucket = np.searchsorted(HISTORY_EDGES, lengths, side="right")
    masks = {name: bucket == i for i, name in enumerate(_HISTORY_NAMES)}
    return {**masks, "item_first": counts == 0, "item_repeat": counts > 0}


class Metrics:
    """Collects scored samples batch by batch; keeps every sample, since exact AUC needs all.

    Args:
        probabilities: whether scores are probabilities; if not, log loss and calibration error,
            which would mean nothing, are left out.
    """

    def __init__(self, *, probabilities: bool = True) -> None:
        self._probabilities = probabilities
        self._labels: list[NDArray[Any]] = []
        self._scores: list[NDArray[Any]] = []
        self._users: list[NDArray[Any]] = []
        self._slices: list[dict[str, Mask]] = []

    def update(
        self,
        labels: ArrayLike,
        scores: ArrayLike,
        users: ArrayLike,
        slices: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Add samples.

        Args:
            labels: `[Q]` in {0, 1}.
            scores: `[Q]`; probabilities unless said otherwise on construction.
            users: `[Q]`.
            slices: name -> `[Q]` mask; the same names in each update.

        Raises:
            ValueError: for lengths that differ, scores that are not finite, probabilities outside
                [0, 1] or other slices than before.
        """
        parts = (np.asarray(labels), np.asarray(scores), np.asarray(users))
        masks = {name: np.asarray(mask, bool) for name, mask in (slices or {}).items()}
        sizes = {len(part) for part in (*parts, *masks.values())}
        if len(sizes) != 1:
            raise ValueError(f"labels, scores, users and slices must be of one length, got {sizes}")
        _check_scores(parts[1], self._probabilities)
        if self._slices and masks.keys() != self._slices[0].keys():
            raise ValueError(f"slices were {list(self._slices[0])}, now {list(masks)}")
        for kept, part in zip((self._labels, self._scores, self._users), parts, strict=True):
            kept.append(part)
        self._slices.append(masks)

    def compute(self) -> dict[str, float]:
        """Return metrics by name; a slice's are `<metric>/<slice>`, undefined ones are left out."""
        if not self._labels:
            return {}
        labels, scores, users = map(np.concatenate, (self._labels, self._scores, self._users))
        found = self._of(labels, scores, users)
        for name in self._slices[0]:
            mask = np.concatenate([masks[name] for masks in self._slices])
            part = self._of(labels[mask], scores[mask], users[mask])
            found |= {f"{metric}/{name}": value for metric, value in part.items()}
        return {name: value for name, value in found.items() if not np.isnan(value)}

    def _of(
        self, labels: NDArray[Any], scores: NDArray[Any], users: NDArray[Any]
    ) -> dict[str, float]:
        if not len(labels):
            return {}
        found = {"auc": auc(labels, scores), "gauc": gauc(labels, scores, users)}
        if self._probabilities:
            found["log_loss"] = log_loss(labels, scores)
            found["calibration_error"] = calibration_error(labels, scores)
        return found | {"samples": float(len(labels))}


def _check_scores(scores: NDArray[Any], probabilities: bool) -> None:
    if not np.isfinite(scores).all():
        raise ValueError(
            f"scores must be finite, got {int((~np.isfinite(scores)).sum())} that are not"
        )
    if probabilities and len(scores) and not 0 <= scores.min() <= scores.max() <= 1:
        raise ValueError(
            f"scores must be probabilities, got values from {scores.min()} to {scores.max()}; "
            "use Metrics(probabilities=False) for scores of another scale"
        )
