"""Saved estimators: the same predictions again, of the same kinds, and no pickle."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hashtab.models.tabular import PAPER, TabNSAClassifier, TabNSARegressor, files
from tests.models.tabular.tables import classifier, mixed, numbers, regressor

X, LABELS = mixed()


@pytest.fixture(scope="module")
def fitted() -> TabNSAClassifier:
    return classifier(categorical_features=["code"], attention="sparse", members=2).fit(X, LABELS)


def test_a_loaded_classifier_is_the_saved_one(fitted: TabNSAClassifier, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["estimator.json", "weights.safetensors"]
    json.loads((tmp_path / "model" / "estimator.json").read_text(), parse_constant=pytest.fail)
    loaded = TabNSAClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(X), fitted.predict_proba(X))
    np.testing.assert_array_equal(loaded.predict(X), fitted.predict(X))
    np.testing.assert_array_equal(loaded.feature_importances_, fitted.feature_importances_)
    np.testing.assert_array_equal(loaded.feature_names_in_, fitted.feature_names_in_)
    np.testing.assert_array_equal(loaded.explain(X), fitted.explain(X))
    np.testing.assert_array_equal(loaded.explain(X[:1]), fitted.explain(X[:1]))
    assert loaded.history_ == fitted.history_
    assert loaded.n_iter_ == fitted.n_iter_
    assert loaded.n_features_in_ == 5
    assert loaded.get_params() == fitted.get_params()
    loaded.fit(X, LABELS)
    np.testing.assert_array_equal(loaded.predict_proba(X), fitted.predict_proba(X))


def test_true_is_not_one_after_loading_either(tmp_path: Path) -> None:
    frame = pd.DataFrame({"c": [True, 1] * 30}, dtype=object)
    y = np.array(["true", "one"] * 30)
    model = classifier(max_epochs=30, learning_rate=0.02).fit(frame, y)
    model.save(tmp_path)
    for estimator in (model, TabNSAClassifier.load(tmp_path)):
        assert estimator.predict(frame).tolist() == y.tolist()


@pytest.mark.parametrize("quantiles", [None, (0.25,), np.array([0.1, 0.9])])
def test_a_loaded_regressor_is_the_saved_one(quantiles: Any, tmp_path: Path) -> None:
    x, y = numbers(60)
    model = regressor(quantiles=quantiles, max_epochs=2).fit(x, y)
    model.save(tmp_path)
    loaded = TabNSARegressor.load(tmp_path)
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))


def test_the_published_form_is_saved(tmp_path: Path) -> None:
    settings = {**PAPER, "max_epochs": 1, "random_state": 0}
    model = TabNSAClassifier(**settings).fit(X, LABELS)
    model.save(tmp_path)
    loaded = TabNSAClassifier.load(tmp_path)
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
    assert not hasattr(loaded, "feature_importances_")


@pytest.mark.parametrize(
    "kinds",
    [
        np.array(["a", "ü"]),
        np.array(["a", "b"], dtype=object),
        np.array([-1, 4]),
        np.array([1, 2], dtype=np.int8),
        np.array([False, True]),
        np.array([1.0, 2.0]),
    ],
    ids=lambda kinds: str(kinds.dtype),
)
def test_classes_keep_their_type(kinds: Any, tmp_path: Path) -> None:
    x, _ = numbers(20)
    y = kinds[np.arange(20) % 2]
    model = classifier(max_epochs=1, class_weight=dict(zip(kinds.tolist(), [1, 2], strict=True)))
    model.fit(x, y).save(tmp_path)
    loaded = TabNSAClassifier.load(tmp_path)
    assert loaded.classes_.dtype == model.classes_.dtype
    assert loaded.predict(x).tolist() == model.predict(x).tolist()
    assert loaded.class_weight == model.class_weight
    keys = [[type(key) for key in m.get_params()["class_weight"]] for m in (loaded, model)]
    assert keys[0] == keys[1]


def test_parameters_of_numpy_and_generators_are_saved(tmp_path: Path) -> None:
    x, y = numbers(20)
    model = regressor(
        learning_rate=np.float64(1e-3),
        width=np.int64(8),
        max_epochs=1,
        random_state=np.random.RandomState(0),
        categorical_features=np.array([1]),
    )
    model.fit(x, y).save(tmp_path)
    loaded = TabNSARegressor.load(tmp_path)
    assert loaded.random_state is None
    assert (loaded.learning_rate, loaded.width) == (1e-3, 8)
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))


def test_a_diverged_history_is_saved(fitted: TabNSAClassifier, tmp_path: Path) -> None:
    history = fitted.history_
    fitted.history_ = [{"epoch": 1, "training_loss": np.nan, "validation_loss": np.inf}]
    try:
        fitted.save(tmp_path / "model")
    finally:
        fitted.history_ = history
    (record,) = TabNSAClassifier.load(tmp_path / "model").history_
    assert np.isnan(record["training_loss"])
    assert record["validation_loss"] == np.inf


def test_a_folder_is_not_overwritten(fitted: TabNSAClassifier, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        fitted.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("fails", ["save_file", "json.dumps"])
def test_an_interrupted_save_leaves_nothing(
    fitted: TabNSAClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def interrupt(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"{files.__name__}.{fails}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fitted.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_loaded_is_named(fitted: TabNSAClassifier, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no estimator in .*absent"):
        TabNSAClassifier.load(tmp_path / "absent")
    fitted.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds a TabNSAClassifier, load it with"):
        TabNSARegressor.load(tmp_path / "model")
    content = tmp_path / "model" / "estimator.json"
    content.write_text(content.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(ValueError, match="has format 99, this version reads 2"):
        TabNSAClassifier.load(tmp_path / "model")


def test_no_other_attributes_are_loaded(fitted: TabNSAClassifier, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    path = tmp_path / "model" / "estimator.json"
    content = json.loads(path.read_text())
    content["state"] |= {"predict": "hers", "other_": 1}
    path.write_text(json.dumps(content))
    loaded = TabNSAClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(X), fitted.predict(X))
    assert not hasattr(loaded, "other_")


@pytest.mark.parametrize("make", [TabNSAClassifier, TabNSARegressor])
def test_only_fitted_estimators_are_saved(make: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not fitted"):
        make().save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
