"""Statistics of the target for each category: what they are, and that no row sees its own."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from hashtab.models.tabular import TabNSARegressor
from hashtab.models.tabular.statistics import TargetStatistics
from tests.models.tabular.tables import classifier, regressor

LEVELS = (3, 9)


def codes(rows: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    return np.stack([draw.integers(0, count + 2, rows) for count in LEVELS], 1)


def test_means_are_drawn_to_the_mean_of_all() -> None:
    found = np.array([[2], [2], [3], [1]])
    target, weight = np.array([1.0, 0.0, 0.0, 1.0]), np.array([1.0, 1.0, 2.0, 1.0])
    statistics = TargetStatistics((0,), (2,)).fit(found, target, weight)
    mean = 2 / 5
    expected = [0, (1 + mean) / 2, (1 + mean) / 3, mean / 3]
    np.testing.assert_allclose(
        statistics(torch.arange(4)[:, None])[:, 0] + mean, [mean, *expected[1:]]
    )


TRAIN = np.arange(5, 40)


def read(target: np.ndarray) -> torch.Tensor:
    """Return statistics as a network reads them that is validated on the first five rows."""
    statistics, random = TargetStatistics((1,), LEVELS), np.random.default_rng(2)
    return statistics.of_others(codes(40), target, np.ones(40), TRAIN, random)


@given(st.integers(0, 39), st.floats(-9, 9))
def test_no_row_sees_its_own_target_and_none_those_of_validation(row: int, other: float) -> None:
    target = np.random.default_rng(1).normal(size=40)
    before, after = read(target), read(np.where(np.arange(40) == row, other, target))
    assert torch.equal(before[row], after[row])
    if row not in TRAIN:
        assert torch.equal(before, after)


def test_rows_of_validation_are_read_as_new_ones() -> None:
    target = np.random.default_rng(1).normal(size=40)
    learnt = codes(40)[TRAIN], target[TRAIN], np.ones(len(TRAIN))
    new = TargetStatistics((1,), LEVELS).fit(*learnt)(torch.from_numpy(codes(40)[:5]))
    assert torch.equal(read(target)[:5], new)


@pytest.mark.parametrize("categories", [10, 150])
def test_what_says_nothing_teaches_nothing(categories: int) -> None:
    draw = np.random.default_rng(0)
    made = draw.integers(0, categories, 1200)
    x = pd.DataFrame({"group": np.char.add("g", made.astype(str)), "x": draw.normal(size=1200)})
    y = draw.integers(0, 2, 1200)
    model = classifier(max_epochs=25, folds=4).fit(x[:600], y[:600])
    validated = min(record["validation_loss"] for record in model.history_)
    tested = log_loss(y[600:], model.predict_proba(x[600:]))
    assert validated == pytest.approx(np.log(2), abs=0.02)
    assert tested == pytest.approx(np.log(2), abs=0.02)


def test_the_scale_of_weights_means_nothing() -> None:
    x, effect, _ = groups(600)
    found = [
        regressor(max_epochs=2).fit(x, effect, sample_weight=np.full(600, scale)).predict(x)
        for scale in (1.0, 1e4)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def groups(rows: int) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Two hundred shops with few rows each, and a target that goes by the shop."""
    draw = np.random.default_rng(0)
    shop, effect = draw.integers(0, 200, rows), draw.normal(size=200)
    frame = pd.DataFrame(
        {"size": draw.normal(size=rows), "shop": np.char.add("s", shop.astype(str))}
    )
    return frame, effect[shop], effect[shop] + draw.normal(size=rows) > 0


def test_categories_of_few_rows_are_learnt() -> None:
    x, _, y = groups(1600)
    scores = []
    for statistics in (True, False):
        model = classifier(max_epochs=10, target_statistics=statistics).fit(x[:800], y[:800])
        scores.append(roc_auc_score(y[800:], model.predict_proba(x[800:])[:, 1]))
    assert scores[0] > max(scores[1], 0.7)


def test_a_column_and_its_statistic_are_explained_as_one() -> None:
    x, effect, _ = groups(800)
    model = regressor(max_epochs=10, learning_rate=0.01).fit(x, effect)
    shares = model.explain(x)
    assert list(shares.columns) == ["size", "shop"]
    assert model.feature_importances_[1] > 0.8
    assert np.corrcoef(shares["shop"], effect)[0, 1] > 0.8


def test_statistics_are_saved(tmp_path: Path) -> None:
    x, effect, _ = groups(600)
    model = regressor(max_epochs=1).fit(x, effect)
    model.save(tmp_path)
    np.testing.assert_array_equal(TabNSARegressor.load(tmp_path).predict(x), model.predict(x))


def test_few_categories_and_several_classes_have_none() -> None:
    x, effect, y = groups(600)
    assert len(classifier(max_epochs=1).fit(x, y).statistics_.columns) == 1
    few = x.assign(shop=np.char.add("s", (np.arange(len(x)) % 7).astype(str)))
    several = np.digitize(effect, [-0.5, 0.5])
    for frame, labels in ((few, y), (x, several)):
        assert len(classifier(max_epochs=1).fit(frame, labels).statistics_.columns) == 0
