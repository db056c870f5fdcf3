"""TabNSA as scikit-learn users meet it."""

import pickle
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from hashtab.models.tabular import PAPER, TabNSAClassifier, TabNSARegressor
from hashtab.models.tabular.settings import NetworkSettings
from hashtab.models.tabular.training import Trainer
from tests.models.tabular.tables import Array, classifier, mixed, numbers, regressor

X, LABELS = mixed()
both = pytest.mark.parametrize("make", [classifier, regressor])


@pytest.fixture(scope="module")
def fitted() -> TabNSAClassifier:
    return classifier(max_epochs=15).fit(X, LABELS)


@pytest.fixture(scope="module")
def regression() -> TabNSARegressor:
    return regressor(max_epochs=15, learning_rate=0.02).fit(*numbers())


def target(make: Callable[..., Any], rows: int, seed: int = 0) -> Array:
    draw = np.random.default_rng(seed).normal(size=rows)
    return draw > 0 if make is classifier else draw


@pytest.mark.slow
@both
def test_keeps_the_conventions_of_scikit_learn(make: Callable[..., Any]) -> None:
    reason = "folds and batches are drawn by row, so a row twice is not a row of weight two"
    failed = {"check_sample_weight_equivalence_on_dense_data": reason}
    model = make(max_epochs=30, learning_rate=0.03)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(model, expected_failed_checks=failed, on_skip=None)


# Tables


@pytest.mark.parametrize(
    "convert",
    [
        pl.from_pandas,
        pd.DataFrame.convert_dtypes,
        lambda x: x.assign(city=x["city"].astype("category"), member=x["member"].astype(object)),
        lambda x: pl.from_pandas(x).with_columns(pl.col("city").cast(pl.Categorical)),
    ],
    ids=["polars", "nullable", "category", "polars-categorical"],
)
def test_any_frame_gives_the_same_predictions(
    fitted: TabNSAClassifier, convert: Callable[[Any], Any]
) -> None:
    other = convert(X)
    expected = fitted.predict_proba(X)
    np.testing.assert_array_equal(fitted.predict_proba(other), expected)
    again = classifier(max_epochs=15).fit(other, LABELS)
    np.testing.assert_array_equal(again.predict_proba(other), expected)


def test_columns_are_matched_by_name(fitted: TabNSAClassifier) -> None:
    moved = X[X.columns[::-1]].assign(extra="?")
    np.testing.assert_array_equal(fitted.predict_proba(moved), fitted.predict_proba(X))
    assert fitted.feature_names_in_.tolist() == X.columns.tolist()
    with pytest.raises(ValueError, match=r"missing now: \['income'\]"):
        fitted.predict(X.drop(columns="income"))


def test_predicts_from_gaps_infinities_and_new_categories(fitted: TabNSAClassifier) -> None:
    other = pd.DataFrame(
        {
            "age": [np.nan, np.inf, -np.inf, 40],
            "city": [None, "Rome", "Oslo", ""],
            "income": pd.Series([pd.NA, 1, 2, 3], dtype="Int64"),
            "code": [99, -1, 0, 1],
            "member": pd.Series([True, None, False, pd.NA], dtype="boolean"),
        }
    )
    assert np.isfinite(fitted.predict_proba(other)).all()
    with pytest.raises(ValueError, match="column 'age' held numbers in fit"):
        fitted.predict(other.assign(age="old"))
    with pytest.raises(TypeError, match="'age' holds dates or times"):
        fitted.predict(other.assign(age=pd.Timestamp("2024-05-01")))
    with pytest.raises(ValueError, match="0 sample"):
        fitted.predict(X[:0])


@both
@pytest.mark.parametrize(
    "table",
    [
        np.full((20, 1), 3.0),
        np.full((20, 2), np.nan),
        np.arange(20.0)[:, None],
        np.array([True, False] * 10)[:, None],
        np.array([["a"], [None]] * 10, dtype=object),
        pd.DataFrame({"empty": [None] * 20, "n": range(20)}),
        pl.DataFrame({"empty": [None] * 20, "n": range(20)}),
        pd.DataFrame({"inf": [np.inf, -np.inf, np.nan, 1.0] * 5}),
    ],
    ids=["constant", "missing", "one", "bool", "text", "pandas", "polars", "infinite"],
)
def test_degenerate_tables_are_fitted(make: Callable[..., Any], table: Any) -> None:
    model = make(max_epochs=2).fit(table, target(make, 20))
    predictions = model.predict(table)
    assert predictions.shape == (20,)
    if make is regressor:
        assert np.isfinite(predictions).all()


@both
@pytest.mark.parametrize("rows", [2, 3, 4, 30])
def test_few_rows_are_fitted(make: Callable[..., Any], rows: int) -> None:
    x, _ = numbers(rows)
    y = np.arange(rows) % 2
    model = make(folds=8, max_epochs=2).fit(x, y)
    assert model.predict(x).shape == (rows,)


def test_thousands_of_columns_are_fitted() -> None:
    x, _ = numbers(30, 8000)
    frame = pd.DataFrame(x, columns=[f"c{i}" for i in range(8000)])
    model = classifier(max_epochs=1).fit(frame, np.arange(30) % 2)
    probabilities = model.predict_proba(frame)
    some = model.predict_proba(frame[:3])
    np.testing.assert_allclose(probabilities[:3], some, rtol=1e-4)


def test_tables_larger_than_what_is_read_at_once(
    fitted: TabNSAClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fitted.predict_proba(X)
    monkeypatch.setattr(fitted.network_, "rows_at_once", lambda: 7)
    np.testing.assert_allclose(fitted.predict_proba(X), expected, rtol=1e-5)


def test_declared_codes_are_categories() -> None:
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 6, 400)
    x = np.stack([draw.normal(size=400), codes], 1)
    y = np.isin(codes, [0, 3, 4])
    model = classifier(categorical_features=[1], max_epochs=25, learning_rate=0.02).fit(x, y)
    assert model.table_.categorical == (1,)
    assert model.score(x, y) > 0.95


def test_warnings_of_columns_point_to_the_call() -> None:
    frame = X.assign(customer=[f"c{i}" for i in range(len(X))])
    with pytest.warns(UserWarning, match="'customer' holds 120 different categories") as caught:
        classifier(max_epochs=1).fit(frame, LABELS)
    assert caught[0].filename == __file__


def test_the_order_of_columns_does_not_matter_much() -> None:
    x, y = numbers(400, 6)
    scores = []
    for order in (range(6), range(5, -1, -1)):
        model = regressor(max_epochs=15, learning_rate=0.02).fit(x[:200][:, list(order)], y[:200])
        scores.append(model.score(x[200:][:, list(order)], y[200:]))
    assert min(scores) > 0.9
    assert abs(scores[0] - scores[1]) < 0.05


def test_the_published_form_reads_categories() -> None:
    model = TabNSAClassifier(**{**PAPER, "max_epochs": 2, "random_state": 0}).fit(X, LABELS)
    probabilities = model.predict_proba(X)
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(1), 1)


def test_networks_of_long_tables_are_large() -> None:
    settings = NetworkSettings(width=24)
    small, large = settings.sized(9_999), settings.sized(10_000)
    assert small.width == large.width == 24
    assert small.readout_width < large.readout_width
    assert small.blocks < large.blocks
    model = classifier(width=None, readout_width=6).fit(X, LABELS)
    assert model.network_.settings == NetworkSettings(mixer_width=8, readout_width=6).sized(120)


# Tools of scikit-learn


def test_works_in_pipelines_and_searches() -> None:
    x, y = numbers(60)
    pipeline = make_pipeline(StandardScaler(), classifier(max_epochs=2))
    assert len(cross_val_score(pipeline, x, y > 0, cv=2)) == 2
    frame = pl.from_pandas(X)
    grid = {"width": [4, 8], "dropout": np.linspace(0, 0.1, 2)}
    search = GridSearchCV(classifier(max_epochs=1), grid, cv=2).fit(frame, LABELS)
    assert search.predict(frame).shape == LABELS.shape
    regressors = cross_val_score(regressor(max_epochs=2), pd.DataFrame(x), y, cv=2)
    assert np.isfinite(regressors).all()


def test_clones_and_pickles(fitted: TabNSAClassifier) -> None:
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))
    fresh = clone(fitted)
    assert fresh.get_params() == fitted.get_params()
    assert not hasattr(fresh, "network_")
    np.testing.assert_array_equal(fresh.fit(X, LABELS).predict_proba(X), fitted.predict_proba(X))


def test_learns_and_predicts_labels(fitted: TabNSAClassifier) -> None:
    assert fitted.score(X, LABELS) > 0.85
    probabilities = fitted.predict_proba(X)
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
    np.testing.assert_array_equal(fitted.classes_[probabilities.argmax(1)], fitted.predict(X))


# Randomness


@both
def test_a_row_is_answered_alone_as_among_others(make: Callable[..., Any]) -> None:
    x, _ = numbers()
    model = make(folds=8, max_epochs=2).fit(x, target(make, len(x)))
    answer = model.predict_proba if make is classifier else model.predict
    together = answer(x)
    alone = np.concatenate([answer(x[i : i + 1]) for i in range(len(x))])
    np.testing.assert_array_equal(alone, together)


@both
def test_the_seed_alone_decides(make: Callable[..., Any]) -> None:
    x, _ = numbers(40)
    y = target(make, 40)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = make(max_epochs=2).fit(x, y)
    assert torch.equal(torch.rand(3), expected)
    second = make(max_epochs=2).fit(x, y)
    other = make(max_epochs=2, random_state=1).fit(x, y)
    stream = np.random.RandomState(0)
    streamed = [make(max_epochs=2, random_state=stream).fit(x, y) for _ in range(2)]

    def answers(model: Any) -> Array:
        out: Array = model.predict_proba(x) if make is classifier else model.predict(x)
        return out

    np.testing.assert_array_equal(answers(first), answers(second))
    np.testing.assert_array_equal(answers(first), answers(streamed[0]))
    assert (answers(first) != answers(other)).any()
    assert (answers(first) != answers(streamed[1])).any()


# Weights


@both
def test_rows_of_no_weight_are_as_if_absent(make: Callable[..., Any]) -> None:
    frame = X.copy()
    y = LABELS if make is classifier else np.arange(len(X), dtype=float)
    weight = np.where(np.arange(len(X)) % 3 == 0, 0.0, 2.0)
    frame.loc[weight == 0, "city"] = "nowhere"
    frame.loc[weight == 0, "age"] = 1e9
    kept = weight > 0
    expected = make().fit(frame[kept], y[kept])
    for other in (frame, pl.from_pandas(frame)):
        model = make().fit(other, y, sample_weight=weight)
        np.testing.assert_array_equal(model.predict(frame), expected.predict(frame))
        assert model.table_ == expected.table_


def test_weights_move_predictions() -> None:
    x = np.zeros((100, 1))
    y = np.arange(100) % 2
    model = classifier(max_epochs=30, learning_rate=0.02, folds=1)
    for weights in (
        {"sample_weight": np.where(y == 1, 9.0, 1.0)},
        {"class_weight": {0: 1.0, 1: 9.0}},
    ):
        fit = {k: v for k, v in weights.items() if k == "sample_weight"}
        changed = clone(model).set_params(class_weight=weights.get("class_weight"))
        assert changed.fit(x, y, **fit).predict_proba(x)[0, 1] == pytest.approx(0.9, abs=0.05)
    rare = np.arange(100) < 10
    balanced = clone(model).set_params(class_weight="balanced").fit(x, rare)
    assert balanced.predict_proba(x)[0, 1] == pytest.approx(0.5, abs=0.1)
    assert model.fit(x, rare).predict_proba(x)[0, 1] < 0.25


@pytest.mark.parametrize("weight", [np.zeros(120), -np.ones(120), np.ones(7), np.full(120, np.nan)])
def test_wrong_weights_are_refused(weight: Array) -> None:
    with pytest.raises(ValueError, match=r"(?i)sample.weight"):
        classifier().fit(X, LABELS, sample_weight=weight)


@pytest.mark.parametrize("weight", [0, -1.0, np.inf, np.nan])
def test_wrong_weights_of_classes_are_refused(weight: float) -> None:
    message = rf"class_weight must be positive .* got {weight:g} for class 'yes'; .* leave its rows"
    with pytest.raises(ValueError, match=message):
        classifier(class_weight={"yes": weight, "no": 1}).fit(X, LABELS)


def test_weights_of_classes_are_read_as_scikit_learn_does() -> None:
    def answers(**weights: float) -> Array:
        model = classifier(class_weight=weights).fit(X, LABELS, eval_set=(X[:20], ["no"] * 20))
        return model.predict_proba(X)

    np.testing.assert_array_equal(answers(yes=3), answers(yes=3, no=1))
    np.testing.assert_array_equal(answers(yes=3, no=1, maybe=9), answers(yes=3, no=1))
    with pytest.raises(ValueError, match=r"\['no'\], are not in class_weight"):
        answers(yes=3, nope=1)


# Training


def test_an_eval_set_chooses_the_epoch() -> None:
    x, y = numbers(80)
    model = regressor(max_epochs=12, patience=3, learning_rate=0.02)
    model.fit(x, y, eval_set=(x, -y))  # the first epoch is the best, whatever is learned
    assert model.n_iter_ <= 6
    assert model.score(x, y) < 0.75
    model.fit(x, y, eval_set=(x[:40], y[:40], np.ones(40)))
    assert model.n_iter_ > 6
    assert model.score(x, y) > 0.75


def test_an_eval_set_of_classes_is_checked(fitted: TabNSAClassifier) -> None:
    with pytest.raises(ValueError, match=r"eval_set holds labels that y does not: \['maybe'\]"):
        classifier().fit(X, LABELS, eval_set=(X[:2], ["yes", "maybe"]))
    with pytest.raises(ValueError, match=r"missing now: \['age'\]"):
        classifier().fit(X, LABELS, eval_set=(X.drop(columns="age"), LABELS))
    model = classifier().fit(X, LABELS, eval_set=(pl.from_pandas(X), LABELS))
    assert model.score(X, LABELS) > 0.4


def test_a_time_budget_stops() -> None:
    x, y = numbers(40)
    start = time.monotonic()
    model = regressor(max_epochs=100_000, patience=100_000, time_budget=0.2).fit(x, y)
    assert time.monotonic() - start < 30
    assert 1 <= model.n_iter_ < 100_000
    assert len(model.history_) == model.n_iter_


def test_divergence_is_an_error() -> None:
    x, y = numbers(40)
    with pytest.raises(ValueError, match=r"2 of 2 networks .* lower learning_rate \(1e\+06 now\)"):
        regressor(learning_rate=1e6).fit(x, y)
    with pytest.raises(ValueError, match="enormous numbers in the target"):
        regressor().fit(x, y, eval_set=(x, 1e30 * y))


def test_a_bar_is_shown_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = numbers(20)
    regressor().fit(x, y)
    assert capsys.readouterr() == ("", "")
    regressor(verbose=1, max_epochs=2).fit(x, y)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "2/2" in shown.err
    assert "validation_loss" in shown.err


def test_threads_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = numbers(20)
    before = torch.get_num_threads()
    seen = []
    fit = Trainer.fit

    def watched(trainer: Trainer) -> Any:
        seen.append(torch.get_num_threads())
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", watched)
    torch.set_num_threads(2)
    try:
        regressor(n_jobs=None, max_epochs=1).fit(x, y).predict(x)
        regressor(n_jobs=2, max_epochs=1).fit(x, y).predict(x)
        assert seen == [1, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# Refusals


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 0),
        ("width", 8.5),
        ("heads", 0),
        ("bins", -1),
        ("blocks", -1),
        ("dropout", 0.999),
        ("dropout", -0.1),
        ("attention", "all"),
        ("fusion", "product"),
        ("columns", "none"),
        ("numeric", "log"),
        ("readout", "last"),
        ("members", 0),
        ("folds", 0),
        ("folds", 2.5),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("batch_size", 0),
        ("max_epochs", 0),
        ("patience", 0),
        ("time_budget", 0),
        ("n_jobs", 0),
    ],
)
@both
def test_wrong_settings_are_refused_in_fit(make: Callable[..., Any], name: str, value: Any) -> None:
    model = make(**{name: value})
    x, _ = numbers(20)
    with pytest.raises(ValueError, match=rf"{name} .*{value}"):
        model.fit(x, target(make, 20))


def test_settings_at_their_ends_are_fitted() -> None:
    x, y = numbers(20)
    for changed in ({"dropout": 0.99}, {"width": 9}, {"width": 9, "attention": "none"}):
        assert np.isfinite(regressor(**changed).fit(x, y).predict(x)).all()
    for attention in ("dense", "sparse"):
        with pytest.raises(ValueError, match=r"heads must divide width, .*heads=2, .*width=9"):
            regressor(width=9, attention=attention).fit(x, y)


@pytest.mark.parametrize("quantiles", [(), (0.0,), (0.5, 1.0), (0.9, 0.1), (0.5, 0.5)])
def test_wrong_quantiles_are_refused(quantiles: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"quantiles must .* got \("):
        regressor(quantiles=quantiles).fit(*numbers(20))


def test_wrong_targets_are_refused() -> None:
    x, y = numbers(20)
    with pytest.raises(ValueError, match=r"one class only .*stratify"):
        classifier().fit(x, np.ones(20))
    with pytest.raises(ValueError, match="continuous"):
        classifier().fit(x, y)
    with pytest.raises(ValueError, match="y contains NaN"):
        regressor().fit(x, np.where(y > 0, np.nan, y))
    with pytest.raises(ValueError, match="1d array"):
        regressor().fit(x, np.stack([y, y], 1))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        regressor().fit(x, y[:7])


# Regression


def test_predictions_follow_the_scale_of_the_target(regression: TabNSARegressor) -> None:
    x, y = numbers()
    expected = regression.predict(x)
    assert regression.score(x, y) > 0.95
    for scale, shift in ((1000, 5), (-0.01, 0), (1, 1e9)):
        changed = clone(regression).fit(x, scale * y + shift)
        if scale > 0:  # learning itself is not symmetric
            predictions = (changed.predict(x) - shift) / scale
            np.testing.assert_allclose(predictions, expected, rtol=1e-2, atol=1e-2 * y.std())
        assert changed.score(x, scale * y + shift) > 0.95


def test_a_constant_target_is_predicted() -> None:
    x, _ = numbers(20)
    np.testing.assert_allclose(regressor().fit(x, np.full(20, 0.1)).predict(x), 0.1, atol=0.5)


def test_quantiles_cover_what_they_should() -> None:
    draw = np.random.default_rng(0)
    x = draw.uniform(size=(1500, 2))
    y = 4 * x[:, 0] + draw.normal(size=1500)
    quantiles = (0.1, 0.5, 0.9)
    model = regressor(quantiles=quantiles, max_epochs=25, learning_rate=0.01).fit(x[:750], y[:750])
    predictions = model.predict(x[750:])
    assert predictions.shape == (750, 3)
    assert (np.diff(predictions) >= 0).all()
    np.testing.assert_allclose((y[750:, None] < predictions).mean(0), quantiles, atol=0.07)
    single = regressor(quantiles=[0.9]).fit(x, y)
    assert single.predict(x).shape == (1500,)


# Serving


@pytest.mark.parametrize("changed", [{}, {"attention": "sparse", "block": 2}, {"members": 2}])
def test_served_is_predict_proba(changed: dict[str, Any]) -> None:
    model = classifier(max_epochs=2, **changed).fit(X, LABELS)
    numeric, categories = model.table_.values(model.table_.frame(X, model))
    inputs = (torch.from_numpy(numeric), torch.from_numpy(model.table_.codes(categories)))
    served = model.served()
    probabilities = served(*inputs)
    assert probabilities.dtype == torch.float32
    np.testing.assert_allclose(probabilities, model.predict_proba(X), atol=1e-6)
    assert served(*(part[:0] for part in inputs)).shape == (0, 2)
    if not changed.get("attention"):
        return
    plain = served.for_export()
    rows = torch.export.Dim("rows")
    program = torch.export.export(plain, inputs, dynamic_shapes=({0: rows}, {0: rows}))
    for count in (2, 5, len(X)):
        some = tuple(part[:count] for part in inputs)
        torch.testing.assert_close(program.module()(*some), probabilities[:count])
    impls = {m.impl for m in model.network_.modules() if hasattr(m, "impl")}
    assert impls <= {"auto"}  # exporting a copy left the estimator as it was


def test_served_regressors_answer_in_units_of_the_target(regression: TabNSARegressor) -> None:
    x, _ = numbers()
    served = regression.served()
    answers = served(torch.from_numpy(x), torch.zeros(len(x), 0, dtype=torch.int64))
    np.testing.assert_allclose(answers, regression.predict(x), rtol=1e-5, atol=1e-6)
