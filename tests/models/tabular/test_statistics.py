"""Statistics of the target for each category: what they are, and that no row sees its own."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold

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


@given(st.integers(0, 39), st.floats(-9, 9))
def test_no_row_sees_its_own_target(row: int, other: float) -> None:
    target, weight = np.random.default_rng(1).normal(size=40), np.ones(40)
    found = [
        TargetStatistics((1,), LEVELS).of_others(codes(40), values, weight, KFold(5))
        for values in (target, np.where(np.arange(40) == row, other, target))
    ]
    assert torch.equal(found[0][row], found[1][row])


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
