"""TabNSA as scikit-learn estimators: tables in, probabilities, means or quantiles out."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import column_or_1d, compute_class_weight, compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted

from hashtab.models.tabular.base import BaseTabNSA, Labelled
from hashtab.models.tabular.losses import CrossEntropy, Loss, Pinball, SquaredError
from hashtab.models.tabular.settings import Attention, Columns, Fusion, Numeric, Readout
from hashtab.models.tabular.table import Frame, Table

Array = npt.NDArray[Any]


class TabNSAClassifier(ClassifierMixin, BaseTabNSA):  # type: ignore[misc]
    """Classify rows of a table: native sparse attention over columns beside a TabMixer.

    After TabNSA (arXiv 2503.09850). Each column is a token with an embedding of its own; numbers
    may be missing or infinite, categories missing or new. `folds` networks train side by side, each
    choosing its best epoch on rows of its own, and their probabilities are averaged.

    Args:
        categorical_features: names or positions of columns that are categorical whatever their
            type, such as integer codes; columns of text, bools and categories are so anyway.
        width, blocks, mixer, mixer_width, attention, heads, block, selected, window, fusion,
        columns, numeric, bins, target_statistics, readout, readout_width, members, dropout: see
            `NetworkSettings`.
        folds, learning_rate, weight_decay, batch_size, max_epochs, patience, clip,
        averaging, time_budget: see `TrainingSettings`.
        device: "cpu", "cuda", ... to train on; "auto" takes a GPU where there is one. Predictions
            are made on the CPU.
        random_state: seed of folds, initial weights and order of rows.
        n_jobs: threads to compute with; None is 1, as in scikit-learn, and -1 all cores.
        verbose: a bar over the epochs where not 0.
        class_weight: None, "balanced", or weights of classes, above 0; 1 for those not named.

    Attributes:
        classes_: labels, sorted.
        table_: names, kinds and categories of the columns.
        n_features_in_: number of columns.
        feature_names_in_: their names, where the fitted table had some.
        feature_importances_: `[F]`, each column's mean share of what drove predictions, of sum 1;
            it and `baseline_` are there with `columns="own"` only.
        baseline_: `[S, T, 1, D]`, mean tokens of the training rows, with which `explain` compares.
        history_: a record of each epoch: training and validation loss.
        n_iter_: epochs.
    """

    _PLAIN: ClassVar[tuple[str, ...]] = (*BaseTabNSA._PLAIN, "classes_", "feature_importances_")

    def __init__(
        self,
        *,
        categorical_features: Sequence[str | int] | None = None,
        width: int | None = None,
        blocks: int | None = None,
        mixer: bool = True,
        mixer_width: int | None = None,
        attention: Attention = "auto",
        heads: int = 2,
        block: int = 16,
        selected: int = 2,
        window: int = 16,
        fusion: Fusion = "sum",
        columns: Columns = "own",
        numeric: Numeric = "piecewise",
        bins: int | None = None,
        target_statistics: bool = True,
        readout: Readout = "auto",
        readout_width: int | None = None,
        members: int = 1,
        dropout: float = 0.15,
        folds: int = 8,
        learning_rate: float = 4e-3,
        weight_decay: float = 1 / 60,
        batch_size: int | None = None,
        max_epochs: int = 400,
        patience: int = 16,
        clip: float = 1.0,
        averaging: float = 3.0,
        time_budget: float | None = None,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        n_jobs: int | None = None,
        verbose: int = 0,
        class_weight: Mapping[Any, float] | Literal["balanced"] | None = None,
    ) -> None:
        super().__init__(
            categorical_features=categorical_features,
            width=width,
            blocks=blocks,
            mixer=mixer,
            mixer_width=mixer_width,
            attention=attention,
            heads=heads,
            block=block,
            selected=selected,
            window=window,
            fusion=fusion,
            columns=columns,
            numeric=numeric,
            bins=bins,
            target_statistics=target_statistics,
            readout=readout,
            readout_width=readout_width,
            members=members,
            dropout=dropout,
            folds=folds,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
            max_epochs=max_epochs,
            patience=patience,
            clip=clip,
            averaging=averaging,
            time_budget=time_budget,
            device=device,
            random_state=random_state,
            n_jobs=n_jobs,
            verbose=verbose,
        )
        self.class_weight = class_weight

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        eval_set: tuple[Any, ...] | None = None,
        warm_start_from: BaseTabNSA | None = None,
        freeze_backbone: bool = False,
    ) -> Self:
        """Train.

        Args:
            X: frame of pandas or polars, or array, `[N, F]`.
            y: labels `[N]`.
            sample_weight: `[N]`, not negative.
            eval_set: `(X, y)` or `(X, y, sample_weight)` that chooses the best epochs in place of
                folds of the training rows.
            warm_start_from: fitted estimator of the same settings, maybe this one, whose weights
                are carried over for columns of the same name and kind.
            freeze_backbone: train only embeddings and head; needs `warm_start_from`.

        Raises:
            TypeError: a column holds dates, or what is neither number nor category.
            ValueError: a setting, a shape, a label or a weight is wrong, there is one class only,
                or training diverged.

        Warns:
            UserWarning: a column of text looks like numbers, or like names of single rows.
        """
        source = self._source(warm_start_from, freeze_backbone)
        frame = Frame(X, self)
        check_classification_targets(column_or_1d(y, warn=True))
        self.classes_ = np.unique(column_or_1d(y))
        if len(self.classes_) < 2:
            raise ValueError(
                f"y holds one class only ({self.classes_[0]!r}): TabNSAClassifier needs two; with "
                "cross-validation, stratify the folds"
            )
        data = self._of_classes(frame, y, sample_weight)
        self._set_table(Table.of(data.frame, self.categorical_features))
        held_out = None
        if eval_set is not None:
            x, *labels = eval_set
            held_out = self._of_classes(self.table_.frame(x, self), *labels)
        return self._fit(data, held_out, source, freeze_backbone)

    def _of_classes(self, frame: Frame, y: Any, sample_weight: Any = None) -> Labelled:
        labels = column_or_1d(y)
        target = np.searchsorted(self.classes_, labels).clip(max=len(self.classes_) - 1)
        unknown = labels[self.classes_[target] != labels]
        if len(unknown):
            raise ValueError(f"eval_set holds labels that y does not: {np.unique(unknown)[:5]}")
        data = self._labelled(frame, target.astype(np.int64), sample_weight)
        if self.class_weight is None:
            return data
        return data._replace(weight=data.weight * self._weights_of_classes(data.target))

    def _weights_of_classes(self, target: Array) -> Array:
        """Return the weight `[N]` of each row's class, as scikit-learn reads `class_weight`."""
        if not isinstance(self.class_weight, Mapping):
            weights: Array = compute_sample_weight(self.class_weight, target)
            return weights
        given = dict(self.class_weight)
        by_class: Array = compute_class_weight(given, classes=self.classes_, y=self.classes_)
        for label, weight in zip(self.classes_.tolist(), by_class, strict=True):
            if not 0 < weight < np.inf:
                raise ValueError(
                    f"class_weight must be positive and finite, got {weight:g} for class "
                    f"{label!r}; to leave a class out, leave its rows out"
                )
        return by_class[target]

    def predict_proba(self, X: Any) -> Array:
        """Return probabilities `[N, K]` float64, in the order of `classes_`."""
        probabilities = self._predict(X)
        sums: Array = probabilities.sum(1, keepdims=True)
        return probabilities / sums

    def predict(self, X: Any) -> Array:
        """Return the most probable labels `[N]`."""
        check_is_fitted(self)
        labels: Array = self.classes_[self._predict(X).argmax(1)]
        return labels

    def _loss(self) -> Loss:
        return CrossEntropy(len(self.classes_))


class TabNSARegressor(RegressorMixin, BaseTabNSA):  # type: ignore[misc]
    """Predict a number from rows of a table: native sparse attention beside a TabMixer.

    As `TabNSAClassifier`; the target is standardised in training.

    Args:
        categorical_features: names or positions of columns that are categorical whatever their
            type, such as integer codes; columns of text, bools and categories are so anyway.
        width, blocks, mixer, mixer_width, attention, heads, block, selected, window, fusion,
        columns, numeric, bins, target_statistics, readout, readout_width, members, dropout: see
            `NetworkSettings`.
        folds, learning_rate, weight_decay, batch_size, max_epochs, patience, clip,
        averaging, time_budget: see `TrainingSettings`.
        device: "cpu", "cuda", ... to train on; "auto" takes a GPU where there is one. Predictions
            are made on the CPU.
        random_state: seed of folds, initial weights and order of rows.
        n_jobs: threads to compute with; None is 1, as in scikit-learn, and -1 all cores.
        verbose: a bar over the epochs where not 0.
        quantiles: of the target to predict, each between 0 and 1; its mean when None.

    Attributes:
        table_: names, kinds and categories of the columns.
        n_features_in_: number of columns.
        feature_names_in_: their names, where the fitted table had some.
        feature_importances_: `[F]`, each column's mean share of what drove predictions, of sum 1;
            it and `baseline_` are there with `columns="own"` only.
        baseline_: `[S, T, 1, D]`, mean tokens of the training rows, with which `explain` compares.
        history_: a record of each epoch: training and validation loss.
        n_iter_: epochs.
    """

    _PLAIN: ClassVar[tuple[str, ...]] = (
        *BaseTabNSA._PLAIN,
        "target_mean_",
        "target_scale_",
        "feature_importances_",
    )

    def __init__(
        self,
        *,
        categorical_features: Sequence[str | int] | None = None,
        width: int | None = None,
        blocks: int | None = None,
        mixer: bool = True,
        mixer_width: int | None = None,
        attention: Attention = "auto",
        heads: int = 2,
        block: int = 16,
        selected: int = 2,
        window: int = 16,
        fusion: Fusion = "sum",
        columns: Columns = "own",
        numeric: Numeric = "piecewise",
        bins: int | None = None,
        target_statistics: bool = True,
        readout: Readout = "auto",
        readout_width: int | None = None,
        members: int = 1,
        dropout: float = 0.15,
        folds: int = 8,
        learning_rate: float = 4e-3,
        weight_decay: float = 1 / 60,
        batch_size: int | None = None,
        max_epochs: int = 400,
        patience: int = 16,
        clip: float = 1.0,
        averaging: float = 3.0,
        time_budget: float | None = None,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        n_jobs: int | None = None,
        verbose: int = 0,
        quantiles: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            categorical_features=categorical_features,
            width=width,
            blocks=blocks,
            mixer=mixer,
            mixer_width=mixer_width,
            attention=attention,
            heads=heads,
            block=block,
            selected=selected,
            window=window,
            fusion=fusion,
            columns=columns,
            numeric=numeric,
            bins=bins,
            target_statistics=target_statistics,
            readout=readout,
            readout_width=readout_width,
            members=members,
            dropout=dropout,
            folds=folds,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
            max_epochs=max_epochs,
            patience=patience,
            clip=clip,
            averaging=averaging,
            time_budget=time_budget,
            device=device,
            random_state=random_state,
            n_jobs=n_jobs,
            verbose=verbose,
        )
        self.quantiles = quantiles

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        eval_set: tuple[Any, ...] | None = None,
        warm_start_from: BaseTabNSA | None = None,
        freeze_backbone: bool = False,
    ) -> Self:
        """Train; see `TabNSAClassifier.fit`, with numbers `[N]` as `y`.

        Raises:
            TypeError: a column holds dates, or what is neither number nor category.
            ValueError: a setting, a shape or a quantile is wrong, `y` is not finite, or training
                diverged.
        """
        source = self._source(warm_start_from, freeze_backbone)
        frame = Frame(X, self)
        self._check_quantiles()
        data = self._labelled(frame, _numbers(y), sample_weight)
        self._set_table(Table.of(data.frame, self.categorical_features))
        self.target_mean_ = float(data.target.mean())
        self.target_scale_ = float(data.target.std()) or 1.0
        data = self._standardised(data)
        held_out = None
        if eval_set is not None:
            x, labels, *weight = eval_set
            frame = self.table_.frame(x, self)
            held_out = self._standardised(self._labelled(frame, _numbers(labels), *weight))
        return self._fit(data, held_out, source, freeze_backbone)

    def _check_quantiles(self) -> None:
        if self.quantiles is None:
            return
        quantiles = np.asarray(self.quantiles, dtype=float)
        inside = (quantiles > 0) & (quantiles < 1)
        if quantiles.ndim != 1 or not len(quantiles) or not inside.all():
            raise ValueError(f"quantiles must lie between 0 and 1, got {self.quantiles}")
        if (np.diff(quantiles) <= 0).any():
            raise ValueError(f"quantiles must increase, got {self.quantiles}")

    def _standardised(self, data: Labelled) -> Labelled:
        target = (data.target - self.target_mean_) / self.target_scale_
        return data._replace(target=target.astype(np.float32))

    def predict(self, X: Any) -> Array:
        """Return means `[N]` float64, or quantiles `[N]`, or `[N, Q]` for Q > 1 of them."""
        predictions: Array = self._predict(X)
        if predictions.shape[1] > 1:
            return predictions
        single: Array = predictions[:, 0]
        return single

    def _loss(self) -> Loss:
        return SquaredError() if self.quantiles is None else Pinball(tuple(self.quantiles))

    def _target_scale(self) -> tuple[float, float]:
        return self.target_scale_, self.target_mean_


def _numbers(y: Any) -> Array:
    target = column_or_1d(y, warn=True)
    numbers: Array = check_array(target, ensure_2d=False, dtype=np.float64, input_name="y")
    return numbers
