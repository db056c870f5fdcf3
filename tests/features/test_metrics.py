"""Metrics against scikit-learn and against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from hashtab.features.metrics import (
    Metrics,
    auc,
    calibration_error,
    gauc,
    log_loss,
    standard_slices,
)

EXACT = 1e-12


def scored(seed: int, n: int = 400, users: int = 12, levels: int = 30) -> tuple[np.ndarray, ...]:
    """Labels, tied scores in (0, 1) and users in no order."""
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, levels, n) + 0.5) / levels
    labels = (rng.random(n) < scores).astype(np.float32)
    return labels, scores, rng.integers(0, users, n)


@given(
    pairs=st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=2, max_size=30),
)
def test_auc_is_the_share_of_pairs_won_ties_counting_half(pairs: list[tuple[bool, int]]) -> None:
    labels, scores = (np.array(column) for column in zip(*pairs, strict=True))
    won = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    if not won:
        assert np.isnan(auc(labels, scores))
    else:
        assert auc(labels, scores) == pytest.approx(np.mean(won), abs=EXACT)


@pytest.mark.parametrize("levels", [2, 30, 10**6])
def test_auc_equals_scikit_learn(levels: int) -> None:
    labels, scores, _ = scored(1, levels=levels)
    assert auc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores), abs=EXACT)


def test_gauc_is_the_auc_of_users_weighted_by_samples_without_those_of_one_class() -> None:
    labels, scores, users = scored(2, users=90)
    parts = []
    for user in np.unique(users):
        mine = users == user
        if 0 < labels[mine].sum() < mine.sum():
            parts.append((sk.roc_auc_score(labels[mine], scores[mine]), mine.sum()))
    assert len(parts) < 90
    values, weights = zip(*parts, strict=True)
    expected = np.average(values, weights=weights)
    assert gauc(labels, scores, users) == pytest.approx(expected, abs=EXACT)


def test_log_loss_equals_scikit_learn_and_stays_finite() -> None:
    labels, scores, _ = scored(3)
    assert log_loss(labels, scores) == pytest.approx(sk.log_loss(labels, scores), abs=EXACT)
    assert np.isfinite(log_loss([0.0, 1.0], [1.0, 0.0]))


def test_calibration_error_is_the_mean_gap_of_equally_wide_bins() -> None:
    labels, scores, _ = scored(4)
    expected = 0.0
    for low in np.arange(10) / 10:
        inside = (scores >= low) & (scores < low + 0.1)
        if inside.any():
            expected += inside.mean() * abs(
                np.mean(labels[inside], dtype=float) - scores[inside].mean()
            )
    assert calibration_error(labels, scores, bins=10) == pytest.approx(expected, abs=EXACT)
    assert calibration_error([1.0, 0.0], [1.0, 0.0]) == 0


@pytest.mark.parametrize("pieces", [1, 7])
def test_streaming_equals_the_whole(pieces: int) -> None:
    labels, scores, users = scored(5)
    slices = standard_slices(np.arange(400) * 6, users % 2)
    collected = Metrics()
    for part in np.array_split(np.random.default_rng(0).permutation(400), pieces):
        masks = {name: mask[part] for name, mask in slices.items()}
        collected.update(labels[part], scores[part], users[part], masks)
    found = collected.compute()
    assert found["gauc"] == gauc(labels, scores, users)
    assert found["auc"] == auc(labels, scores)
    repeat = slices["item_repeat"]
    assert found["gauc/item_repeat"] == gauc(labels[repeat], scores[repeat], users[repeat])
    assert found["samples/item_first"] + found["samples/item_repeat"] == found["samples"] == 400


def test_slices_by_history_length_cover_every_sample_once() -> None:
    lengths = np.array([0, 1, 49, 50, 199, 200, 499, 500, 999, 1000, 1999, 2000, 10**6])
    masks = standard_slices(lengths, np.zeros(len(lengths)))
    history = {name: mask for name, mask in masks.items() if name.startswith("history")}
    assert (np.sum(list(history.values()), axis=0) == 1).all()
    assert lengths[history["history_50_199"]].tolist() == [50, 199]
    assert lengths[history["history_0"]].tolist() == [0]
    assert lengths[history["history_2000_up"]].tolist() == [2000, 10**6]


def test_undefined_metrics_are_left_out() -> None:
    collected = Metrics()
    collected.update([1.0, 1.0], [0.5, 0.6], [0, 0], {"some": [True, True], "none": [False, False]})
    found = collected.compute()
    assert "auc" not in found
    assert "gauc/some" not in found
    assert not any(name.endswith("/none") for name in found)
    assert found["log_loss/some"] == found["log_loss"] > 0
    assert Metrics().compute() == {}


def test_scores_that_are_no_probabilities_are_refused_unless_said() -> None:
    with pytest.raises(ValueError, match=r"must be probabilities, got values from -1\.0 to 2\.0"):
        Metrics().update([0.0, 1.0], [-1.0, 2.0], [0, 0])
    with pytest.raises(ValueError, match="must be finite, got 1"):
        Metrics().update([0.0, 1.0], [0.5, float("nan")], [0, 0])
    with pytest.raises(ValueError, match="of one length"):
        Metrics().update([0.0, 1.0], [0.5], [0, 0])
    ranks = Metrics(probabilities=False)
    ranks.update([0.0, 1.0], [-1.0, 2.0], [0, 0])
    assert ranks.compute() == {"auc": 1.0, "gauc": 1.0, "samples": 2.0}
