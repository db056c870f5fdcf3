"""Which columns drove a prediction."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from torch import Tensor

from hashtab.kernels import nsa
from hashtab.models.tabular import TabNSAClassifier, TabNSARegressor
from hashtab.models.tabular.blocks import ColumnAttention
from hashtab.models.tabular.embedding import Encoded
from hashtab.models.tabular.explain import contributions, mean_tokens
from hashtab.models.tabular.losses import CrossEntropy, Pinball, SquaredError
from hashtab.models.tabular.network import TabNSANetwork
from hashtab.models.tabular.settings import NetworkSettings
from tests.models.tabular.tables import classifier, mixed, numbers, regressor

LONGER: dict[str, Any] = {"max_epochs": 25, "learning_rate": 0.02}
X, LABELS = mixed(300)
X["constant"] = 7.0
X.index = X.index + 1000


@pytest.fixture(scope="module")
def fitted() -> TabNSAClassifier:
    return classifier(**LONGER).fit(X, LABELS)


@pytest.fixture(scope="module")
def regression() -> TabNSARegressor:
    return regressor(**LONGER).fit(*numbers())


def test_a_frame_is_explained_by_one_of_its_kind(fitted: TabNSAClassifier) -> None:
    shares = fitted.explain(X)
    assert isinstance(shares, pd.DataFrame)
    assert shares.columns.tolist() == X.columns.tolist()
    assert shares.index.equals(X.index)
    moved = pl.from_pandas(X).select(pl.lit(0).alias("extra"), *reversed(X.columns))
    again = fitted.explain(moved)
    assert isinstance(again, pl.DataFrame)
    assert again.columns == X.columns.tolist()
    np.testing.assert_allclose(again.to_numpy(), shares.to_numpy(), rtol=1e-4, atol=1e-6)


def test_an_array_is_explained_by_an_array(regression: TabNSARegressor) -> None:
    x, _ = numbers()
    assert regression.explain(x).shape == x.shape
    unnamed = regression.explain(pd.DataFrame(x))
    assert unnamed.columns.tolist() == [0, 1, 2, 3]


def test_the_column_that_makes_the_target_matters_most(
    fitted: TabNSAClassifier, regression: TabNSARegressor
) -> None:
    of_label = [X.columns.tolist().index(name) for name in ("age", "member")]
    for model, best in ((fitted, of_label), (regression, [0])):
        importances = model.feature_importances_
        assert importances.sum() == pytest.approx(1)
        assert (importances >= 0).all()
        assert importances[best].min() > 2 * np.delete(importances, best).max()


@pytest.mark.parametrize("rows", [slice(3, 4), slice(10, 17)])
def test_rows_are_explained_as_among_others(fitted: TabNSAClassifier, rows: slice) -> None:
    some, others = fitted.explain(X[rows]), fitted.explain(X)[rows]
    assert np.abs(some).max(axis=None) > 0.1
    np.testing.assert_allclose(some, others, rtol=1e-3, atol=1e-5)


def test_pickled_and_further_trained_estimators_explain(fitted: TabNSAClassifier) -> None:
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.explain(X[:1]), fitted.explain(X[:1]))
    fewer = X[["member", "age"]]
    again.set_params(max_epochs=2).fit(fewer, LABELS, warm_start_from=fitted)
    some, others = again.explain(fewer[:1]), again.explain(fewer)[:1]
    np.testing.assert_allclose(some, others, rtol=1e-3, atol=1e-5)


def test_a_constant_column_matters_nothing(fitted: TabNSAClassifier) -> None:
    assert fitted.feature_importances_[-1] < 1e-6
    assert np.abs(fitted.explain(X)["constant"]).max() < 1e-5


@pytest.mark.parametrize("order", ["sorted", "pairs"])
def test_importances_are_of_the_whole_table(order: str) -> None:
    # Of two kinds of rows each has a column that decides; the first rows are all of one kind.
    x, _ = numbers(1200, 2)
    rows = np.arange(len(x))
    kind = rows % 2 if order == "pairs" else rows * 2 // len(x)
    x[kind == 0, 1] = x[kind == 1, 0] = 0
    importances = regressor(**LONGER).fit(x, x.sum(1)).feature_importances_
    assert importances.min() > 0.3


def test_a_share_has_the_sign_and_unit_of_its_effect(regression: TabNSARegressor) -> None:
    x, y = numbers()
    shares = regression.explain(x)
    assert np.corrcoef(shares[:, 0], x[:, 0])[0, 1] > 0.8
    assert 0.3 < shares[:, 0].std() / y.std() < 3
    larger = regressor(**LONGER).fit(x, 1000 * y)
    np.testing.assert_allclose(larger.explain(x), 1000 * shares, rtol=1e-2, atol=10)


def test_shares_add_up_to_what_a_row_differs(
    fitted: TabNSAClassifier, regression: TabNSARegressor
) -> None:
    x, _ = numbers()
    predictions = regression.predict(x)
    totals = regression.explain(x).sum(1)
    np.testing.assert_allclose(totals - totals.mean(), predictions - predictions.mean(), atol=0.3)
    totals = fitted.explain(X).sum(axis=1)
    for label in fitted.classes_:  # what speaks for the predicted class is positive, both ways
        chosen = fitted.predict(X) == label
        certain = fitted.predict_proba(X).max(1)[chosen]
        logit = np.log(certain / (1 - certain))
        assert np.corrcoef(totals[chosen], logit)[0, 1] > 0.4


def test_the_first_quantile_is_explained() -> None:
    # Its noise grows with a column that the median does not depend on.
    draw = np.random.default_rng(0)
    x = draw.uniform(size=(800, 2))
    y = x[:, 0] * draw.normal(size=800)
    model = regressor(quantiles=(0.1, 0.9), max_epochs=25, learning_rate=0.01).fit(x, y)
    assert np.corrcoef(model.explain(x)[:, 0], x[:, 0])[0, 1] < -0.5


@pytest.mark.parametrize("rows_at_once", [1000, 2])
def test_shares_are_finite_differences_on_the_way(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    settings = NetworkSettings(width=4, mixer_width=4, readout_width=4, attention="dense").sized(5)
    monkeypatch.setattr(TabNSANetwork, "rows_at_once", lambda _: rows_at_once)
    x = Encoded(
        torch.randn(1, 2, 5).double(),
        torch.rand(1, 2, 5).double(),
        torch.zeros(1, 2, 5, dtype=torch.bool),
        torch.randint(4, (1, 1, 5)),
    )
    losses = ((CrossEntropy(3), 3), (SquaredError(), 1), (Pinball((0.1, 0.9)), 2))
    for loss, outputs in losses:
        network = TabNSANetwork(2, 2, (2,), outputs, settings).double().eval()
        mean = mean_tokens(network, x)
        shares = contributions(network, x, mean, loss)
        with torch.no_grad():
            tokens = network.tokens(x)
            torch.testing.assert_close(mean, tokens.mean(2, keepdim=True))
            for token in range(3):
                step = torch.zeros_like(tokens)
                step[:, token] = 1e-6 * (tokens - mean)[:, token]
                expected = torch.zeros(5).double()
                for k in range(8):
                    at = mean + (k + 0.5) / 8 * (tokens - mean)
                    up, down = (_explained(network, at + s * step, tokens) for s in (1, -1))
                    expected += (up - down) / 16e-6
                torch.testing.assert_close(shares[:, token], expected, rtol=1e-4, atol=1e-7)


def _explained(network: TabNSANetwork, moved: Tensor, tokens: Tensor) -> Tensor:
    answers = network.answer(moved).mean((0, 1))
    if answers.shape[1] < 3:
        return answers[:, 0]
    chosen = network.answer(tokens).softmax(-1).mean((0, 1)).argmax(-1)
    others = torch.stack([answers[i, np.arange(3) != int(c)].mean() for i, c in enumerate(chosen)])
    return answers[torch.arange(5), chosen] - others


def test_shared_tokens_are_not_explained() -> None:
    x, y = numbers(30)
    model = regressor(max_epochs=1).fit(x, y)
    model.set_params(columns="shared", numeric="linear").fit(x, y)
    assert not hasattr(model, "feature_importances_")
    assert not hasattr(model, "baseline_")
    with pytest.raises(ValueError, match='explain needs columns="own"'):
        model.explain(x)


@pytest.mark.parametrize("make", [TabNSAClassifier, TabNSARegressor])
def test_only_fitted_estimators_explain(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="not fitted"):
        make().explain(X)


def sparse(**settings: Any) -> TabNSAClassifier:
    chosen: dict[str, Any] = {"attention": "sparse", "block": 2, "selected": 2, "folds": 2}
    return classifier(**chosen | settings).fit(X, LABELS)


def test_selection_is_told_column_by_column() -> None:
    shares = sparse().selections(X)
    assert isinstance(shares, pd.DataFrame)
    assert shares.columns.tolist() == X.columns.tolist()
    assert shares.index.equals(X.index)
    blocks = -(-X.shape[1] // 2)
    assert 0 <= shares.to_numpy().min() < shares.to_numpy().max() <= 1
    assert shares.nunique().max() > 1  # rows select differently
    everything = sparse(selected=blocks).selections(X)
    np.testing.assert_allclose(everything, np.ones(X.shape))


def test_selection_is_what_the_operator_selects() -> None:
    model = sparse(folds=1, blocks=1)
    attention = next(m for m in model.network_.modules() if isinstance(m, ColumnAttention))
    rows = Encoded(
        *(part[..., :1] for part in model._encode(*model._inputs(model.table_.frame(X, model))))
    )
    tokens = model.network_.tokens(rows)
    q, k, _ = attention._by_row(
        attention.projections(attention.norm(tokens[:, attention.order]).flatten(1, 2)),
        tokens.shape,
    ).chunk(3, 2)
    seen = nsa.selected_blocks(q, k, block=2, stride=2, select_block=2, n_select=2, causal=False)
    place, columns = attention.order.tolist(), X.shape[1]
    found = np.zeros(columns)
    for at in range(columns):
        for head in range(2):
            block = int(seen[0, at, head, 1])
            for position in range(2 * block, min(2 * block + 2, columns)):
                found[place[position]] += 1
    sizes = [2 if at < columns - columns % 2 else 1 for at in range(columns)]
    outside = {place[at]: columns - sizes[at] for at in range(columns)}
    expected = [found[token] / (2 * outside[token]) for token in range(columns)]
    by_token = model.selections(X[:1]).to_numpy()[0][model._column_of()]
    np.testing.assert_allclose(by_token, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"attention": "dense"}, 'needs attention="sparse" and a block'),
        ({"blocks": 0}, 'needs attention="sparse" and a block'),
        ({"selected": 1}, "fit with a selected of 2 or more"),
        ({"block": 16}, r"\d+ columns .* are one block of 16; fit with a smaller block"),
        ({"columns": "shared", "readout": "mean"}, 'selections needs columns="own"'),
    ],
)
def test_what_does_not_select_says_so(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sparse(**settings, max_epochs=1).selections(X)
