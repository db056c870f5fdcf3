"""Registry of models: what is fitted in each track, and with which settings.

A model that stops early, or keeps its best epoch, learns from the `fit` part of a split and reads
its inner validation part: trees by the loss that they learn, as their libraries do when not told
otherwise (by AUC, the few validation rows of a small set stop them after a handful of trees), with
a patience of 50 rounds; networks by the metric that the task is ranked by. A model that needs none,
or splits its training data itself, learns from the whole training part. Packages are imported on
first use, so that each model runs without those of the others.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from experiments.tabular_benchmark.data import Array, Task
from experiments.tabular_benchmark.search_space import Params
from hashtab.models.tabular import PAPER

PATIENCE = 50
TREES = 1_000


class Part(NamedTuple):
    """Rows to learn from: features, and class numbers or values."""

    features: pd.DataFrame
    target: Array


@dataclass(frozen=True)
class Setting:
    """What every model is told.

    Args:
        task: of the set.
        classes: number of them; 0 for regression.
        random_state: of the model; one for each split, so that there is none to choose.
        threads: that the model may use.
        device: `cpu` or a CUDA device; models without GPU code ignore it.
    """

    task: Task
    classes: int
    random_state: int
    threads: int
    device: str


class Model(Protocol):
    """What the benchmark asks of a model."""

    def fit(self, train: Part, validation: Part | None) -> None:
        """Learn; stop early by `validation` where given."""

    def predict(self, features: pd.DataFrame) -> Array:
        """Return `[N, classes]` probabilities, or `[N]` values."""


class Linear:
    """Logistic or ridge regression; one-hot levels, numbers imputed by the median and scaled."""

    def __init__(self, setting: Setting, params: Params) -> None:
        numbers = make_pipeline(
            SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler()
        )
        columns = make_column_transformer(
            (numbers, make_column_selector(dtype_include="number")),
            (
                OneHotEncoder(handle_unknown="ignore"),
                make_column_selector(dtype_exclude="number"),
            ),
        )
        penalty = params.get("penalty", 1.0)
        last = LogisticRegression(C=1 / penalty, max_iter=1_000) if setting.classes else None
        self._model = make_pipeline(columns, last or Ridge(alpha=penalty))
        self._setting = setting

    def fit(self, train: Part, validation: Part | None) -> None:
        del validation
        self._model.fit(*train)

    def predict(self, features: pd.DataFrame) -> Array:
        return _predict(self._model, self._setting, features)


class LightGBM:
    """LightGBM's defaults but a rate of 0.05 and up to 1,000 trees, stopped early."""

    def __init__(self, setting: Setting, params: Params) -> None:
        import lightgbm

        kind = lightgbm.LGBMClassifier if setting.classes else lightgbm.LGBMRegressor
        self._model = kind(
            **{"learning_rate": 0.05, "subsample_freq": 1, **params},
            n_estimators=TREES,
            random_state=setting.random_state,
            n_jobs=setting.threads,
            verbosity=-1,
        )
        self._stop = lightgbm.early_stopping(PATIENCE, verbose=False)
        self._setting = setting

    def fit(self, train: Part, validation: Part | None) -> None:
        assert validation is not None
        self._model.fit(
            self._renamed(train.features),
            train.target,
            eval_X=self._renamed(validation.features),
            eval_y=validation.target,
            callbacks=[self._stop],
        )

    def predict(self, features: pd.DataFrame) -> Array:
        return _predict(self._model, self._setting, self._renamed(features))

    def _renamed(self, features: pd.DataFrame) -> pd.DataFrame:
        """Give columns plain names: LightGBM refuses some characters."""
        return features.set_axis([f"f{i}" for i in range(features.shape[1])], axis=1)


class CatBoost:
    """CatBoost's defaults, categories as they are, 1,000 trees at most, stopped early."""

    def __init__(self, setting: Setting, params: Params) -> None:
        import catboost

        kind = catboost.CatBoostClassifier if setting.classes else catboost.CatBoostRegressor
        self._model = kind(
            **params,
            iterations=TREES,
            early_stopping_rounds=PATIENCE,
            random_seed=setting.random_state,
            thread_count=setting.threads,
            allow_writing_files=False,
            verbose=False,
        )
        self._setting = setting

    def fit(self, train: Part, validation: Part | None) -> None:
        assert validation is not None
        categories = list(train.features.select_dtypes("category").columns)
        self._model.fit(
            self._as_text(train.features),
            train.target,
            cat_features=categories,
            eval_set=(self._as_text(validation.features), validation.target),
        )

    def predict(self, features: pd.DataFrame) -> Array:
        return _predict(self._model, self._setting, self._as_text(features))

    def _as_text(self, features: pd.DataFrame) -> pd.DataFrame:
        """Write categories as text, missing ones as a level: CatBoost refuses NaN in them."""
        text = {
            name: features[name].astype(object).where(features[name].notna(), "missing").astype(str)
            for name in features.select_dtypes("category").columns
        }
        return features.assign(**text)


class Pytabkit:
    """TabM-D with piecewise linear embeddings, or RealMLP-TD, as pytabkit sets them.

    Missing numbers become the median of the rows that are learnt from: neither takes NaN. TabM is
    given 500 epochs at most: where classes can be told apart, log loss falls a little forever and
    its patience never ends.
    """

    def __init__(self, name: str, setting: Setting, params: Params) -> None:
        import pytabkit

        for chatty in ("pytorch_lightning", "lightning.pytorch"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        metric = {"binary": "1-auc_ovr", "multiclass": "cross_entropy", "regression": "rmse"}
        kind = getattr(pytabkit, f"{name}_{'Classifier' if setting.classes else 'Regressor'}")
        defaults: dict[str, Any] = {}
        if name == "TabM_D":
            defaults = {"num_emb_type": "pwl", "n_epochs": 500}
        elif setting.classes:
            defaults["use_ls"] = False  # as its authors advise for AUC and log loss
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in params.items()}
        self._model = kind(
            **{**defaults, **lists},
            val_metric_name=metric[setting.task],
            random_state=setting.random_state,
            n_threads=setting.threads,
            device=setting.device,
        )
        self._setting = setting
        self._medians: pd.Series[float] = pd.Series(dtype=float)

    def fit(self, train: Part, validation: Part | None) -> None:
        assert validation is not None
        self._medians = train.features.median(numeric_only=True).fillna(0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between lightning and torch
            self._model.fit(
                self._filled(train.features),
                train.target,
                self._filled(validation.features),
                validation.target,
            )

    def predict(self, features: pd.DataFrame) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _predict(self._model, self._setting, self._filled(features))

    def _filled(self, features: pd.DataFrame) -> pd.DataFrame:
        numbers = {
            str(name): features[str(name)].astype(np.float32).fillna(median)
            for name, median in self._medians.items()
        }
        return features.assign(**numbers)


class TabNSA:
    """Our own estimators.

    Each network of theirs validates on a fold of its own, so all rows are learnt from; with
    `holdout` they get the inner validation part that the rivals stop on, and learn from the rest.
    """

    def __init__(
        self, settings: Mapping[str, Any], holdout: bool, setting: Setting, params: Params
    ) -> None:
        from hashtab.models.tabular import TabNSAClassifier, TabNSARegressor

        kind = TabNSAClassifier if setting.classes else TabNSARegressor
        self._model = kind(
            random_state=setting.random_state,
            n_jobs=setting.threads,
            device=setting.device,
            **{**settings, **params},
        )
        self._setting, self._holdout = setting, holdout

    def fit(self, train: Part, validation: Part | None) -> None:
        self._model.fit(*train, eval_set=validation if self._holdout else None)

    def predict(self, features: pd.DataFrame) -> Array:
        return _predict(self._model, self._setting, features)


@dataclass(frozen=True)
class Entry:
    """A model of the registry.

    Args:
        make: builds it from a setting and, in the tuned track, drawn parameters.
        validates: whether it needs the inner validation part to stop early.
        packages: whose versions are noted beside its results.
    """

    make: Callable[[Setting, Params], Model]
    validates: bool
    packages: tuple[str, ...]

    def versions(self) -> dict[str, str]:
        """Return the versions of its packages; `source` for one that is not installed."""
        return {name: _version(name) for name in self.packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"


def _ours(holdout: bool = False, **settings: Any) -> Entry:
    packages = ("hashtab", "torch", "numpy")
    return Entry(lambda s, p: TabNSA(settings, holdout, s, p), holdout, packages)


def _pytabkit(name: str) -> Entry:
    packages = ("pytabkit", "torch", "scikit-learn")
    return Entry(lambda s, p: Pytabkit(name, s, p), True, packages)


MODELS: dict[str, Entry] = {
    "linear": Entry(Linear, False, ("scikit-learn",)),
    "lightgbm": Entry(LightGBM, True, ("lightgbm",)),
    "catboost": Entry(CatBoost, True, ("catboost",)),
    "realmlp": _pytabkit("RealMLP_TD"),
    "tabm": _pytabkit("TabM_D"),
    "tabnsa": _ours(),
    "tabnsa-holdout": _ours(holdout=True),
    "tabnsa-batchensemble": _ours(folds=1, members=16),
    "tabnsa-dense": _ours(attention="dense"),
    "tabnsa-sparse": _ours(attention="sparse"),
    "tabnsa-paper": _ours(holdout=True, **PAPER),
}


def _predict(model: Any, setting: Setting, features: pd.DataFrame) -> Array:
    """Return predictions; a class that was not learnt gets probability 0."""
    if not setting.classes:
        return np.asarray(model.predict(features), np.float64).reshape(len(features))
    classes = model[-1].classes_ if hasattr(model, "steps") else model.classes_
    found = np.zeros((len(features), setting.classes))
    found[:, np.asarray(classes, np.int64)] = model.predict_proba(features)
    return found
