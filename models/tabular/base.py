"""What TabNSA's classifier and regressor share: from a frame to trained networks and back."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted
from torch import Tensor

from hashtab.models.tabular import explain, files, transfer
from hashtab.models.tabular.embedding import Encoded, SharedTokens, TableTokens
from hashtab.models.tabular.encoding import NumericEncoder
from hashtab.models.tabular.losses import CrossEntropy, Loss
from hashtab.models.tabular.network import TabNSANetwork
from hashtab.models.tabular.progress import Progress
from hashtab.models.tabular.served import ServedTable
from hashtab.models.tabular.settings import (
    Attention,
    Columns,
    Fusion,
    NetworkSettings,
    Numeric,
    Readout,
    SizedSettings,
    TrainingSettings,
)
from hashtab.models.tabular.statistics import MANY, TargetStatistics
from hashtab.models.tabular.table import Frame, Table
from hashtab.models.tabular.threads import threads
from hashtab.models.tabular.training import Fold, Sample, Trainer

Array = npt.NDArray[Any]
Settings = TypeVar("Settings", NetworkSettings, TrainingSettings)

# Of the training set, for `feature_importances_`: fewer of a table of thousands of columns.
_EXPLAINED_ROWS, _EXPLAINED_AT_LEAST = 300, 16


class Labelled(NamedTuple):
    """A frame with its target as the loss reads it, and weights `[N]`, all above zero."""

    frame: Frame
    target: Array
    weight: Array


class BaseTabNSA(BaseEstimator):  # type: ignore[misc]
    """What classifier and regressor share; the parameters are documented there."""

    _PLAIN: ClassVar[tuple[str, ...]] = ("n_features_in_", "n_iter_", "history_")

    table_: Table
    encoder_: NumericEncoder
    statistics_: TargetStatistics
    network_: TabNSANetwork
    baseline_: Tensor
    device_: torch.device
    history_: list[dict[str, float]]

    def __init__(
        self,
        *,
        categorical_features: Sequence[str | int] | None,
        width: int | None,
        blocks: int | None,
        mixer: bool,
        mixer_width: int | None,
        attention: Attention,
        heads: int,
        block: int,
        selected: int,
        window: int,
        fusion: Fusion,
        columns: Columns,
        numeric: Numeric,
        bins: int | None,
        target_statistics: bool,
        readout: Readout,
        readout_width: int | None,
        members: int,
        dropout: float,
        folds: int,
        learning_rate: float,
        weight_decay: float,
        batch_size: int | None,
        max_epochs: int,
        patience: int,
        clip: float,
        averaging: float,
        time_budget: float | None,
        device: str,
        random_state: int | np.random.RandomState | None,
        n_jobs: int | None,
        verbose: int,
    ) -> None:
        for name, value in locals().items():
            if name not in ("self", "__class__"):
                setattr(self, name, value)

    def _loss(self) -> Loss:
        raise NotImplementedError

    def _target_scale(self) -> tuple[float, float]:
        """Return what predictions are multiplied by, and what is added then."""
        return 1.0, 0.0

    @staticmethod
    def _source(warm_start_from: "BaseTabNSA | None", freeze_backbone: bool) -> "BaseTabNSA | None":
        """Return what weights are carried over from, as it is before this fit replaces any of it.

        Raises:
            NotFittedError: `warm_start_from` is not fitted, maybe because it is the estimator that
                is fitted first now.
        """
        if warm_start_from is None:
            if freeze_backbone:
                raise ValueError("freeze_backbone=True needs warm_start_from: nothing is trained")
            return None
        check_is_fitted(
            warm_start_from,
            "network_",
            msg="warm_start_from must be fitted, but this %(name)s is not fitted yet",
        )
        return copy.copy(warm_start_from)

    def _fit(
        self,
        data: Labelled,
        held_out: Labelled | None,
        source: "BaseTabNSA | None",
        freeze_backbone: bool,
    ) -> Self:
        """Fit on data whose target the subclass has checked; the table is `self.table_`."""
        settings = self._settings(TrainingSettings)
        network_settings = self._network_settings(len(data.target), source)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.device_ = _device(self.device)
        with _own_random(self.device_, seed), threads(self.n_jobs):
            folds = self._folds(data, held_out, settings.folds, seed)
            numbers, codes = self._read(data, network_settings, folds, seed)
            self.encoder_ = NumericEncoder(numbers[0].numpy(), network_settings.bins)
            self.network_ = self._network(len(folds), network_settings)
            if source is not None:
                self._carry_over(source, freeze_backbone)
            self.network_.to(self.device_)
            sample = self._sample(data, numbers, codes)
            if isinstance(self.network_.tokens, TableTokens):
                self.network_.order_columns(sample.rows)
            validation = sample
            if held_out is not None:
                numbers_held_out, codes_held_out = self._inputs(held_out.frame)
                validation = self._sample(held_out, [numbers_held_out], codes_held_out)
            self._train(sample, validation, folds, settings, seed)
            served = self._encode(*self._inputs(data.frame))
            self._rate_columns(Encoded(*(part.to(self.device_) for part in served)))
            self.network_.cpu()
        return self

    def _train(
        self,
        sample: Sample,
        held_out: Sample,
        folds: list[Fold],
        settings: TrainingSettings,
        seed: int,
    ) -> None:
        with Progress(settings.max_epochs, self.verbose) as progress:
            trainer = Trainer(
                self.network_, self._loss(), sample, held_out, folds, settings, seed, progress
            )
            self.history_ = trainer.fit()
        self.n_iter_ = len(self.history_)

    def _set_table(self, table: Table) -> None:
        self.table_ = table
        self.n_features_in_ = len(self.table_.names)
        if self.table_.named:
            self.feature_names_in_ = np.array(self.table_.names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_

    def _labelled(self, frame: Frame, target: Array, sample_weight: Any = None) -> Labelled:
        """Check lengths and weights, and leave rows of no weight out."""
        check_consistent_length(target, range(frame.rows))
        weight = _check_sample_weight(
            sample_weight, np.empty(frame.rows), dtype=np.float64, ensure_non_negative=True
        )
        if not weight.any():
            raise ValueError("sample_weight must not be zero for all rows")
        kept = weight > 0
        if kept.all():
            return Labelled(frame, target, weight)
        return Labelled(frame.rows_where(kept), target[kept], weight[kept])

    def _network_settings(self, rows: int, source: "BaseTabNSA | None") -> SizedSettings:
        settings = self._settings(NetworkSettings)
        return (
            settings.sized(rows)
            if source is None
            else settings.sized_like(source.network_.settings)
        )

    def _network(self, networks: int, settings: SizedSettings) -> TabNSANetwork:
        levels = tuple(len(known) for known in self.table_.categories)
        outputs = self._loss().outputs
        numeric = len(self.table_.numeric) + len(self.statistics_.columns)
        return TabNSANetwork(networks, numeric, levels, outputs, settings)

    def _settings(self, kind: type[Settings]) -> Settings:
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    def _carry_over(self, source: "BaseTabNSA", freeze_backbone: bool) -> None:
        settings, before = self.network_.settings, source.network_.settings
        if settings != before:
            raise ValueError(
                "warm_start_from must have the same settings of the network, got "
                f"{before} for {settings}"
            )
        new, old = ((one.table_, one.statistics_) for one in (self, source))
        shared = transfer.Shared.of(new, old, self.columns == "shared")
        if len(shared.tokens[0]) == 0:
            raise ValueError("warm_start_from must share a column by name and kind, got none")
        transfer.carry_encoder(self.encoder_, source.encoder_, shared)
        transfer.carry_network(self.network_, source.network_, shared)
        if freeze_backbone:
            transfer.freeze_backbone(self.network_)

    def _folds(
        self, data: Labelled, held_out: Labelled | None, count: int, seed: int
    ) -> list[Fold]:
        rows = np.arange(len(data.target))
        if held_out is not None:
            return [Fold(rows, np.arange(len(held_out.target)))] * count
        parts = min(5 if count == 1 else count, len(rows) // 2)
        if parts < 2:
            return [Fold(rows, rows)] * count
        with warnings.catch_warnings():
            # A class with fewer rows than folds is in most of them all the same.
            warnings.simplefilter("ignore", UserWarning)
            splits = list(self._splitter(data.target, parts, seed).split(rows, data.target))
        return [Fold(*splits[i % parts]) for i in range(count)]

    def _splitter(self, target: Array, parts: int, seed: int) -> KFold | StratifiedKFold:
        counts = np.unique(target, return_counts=True)[1] if target.dtype.kind == "i" else [0]
        kind = StratifiedKFold if max(counts) >= parts else KFold
        return kind(parts, shuffle=True, random_state=seed)

    def _sample(self, data: Labelled, numbers: list[Tensor], codes: Tensor) -> Sample:
        """Return a sample whose numbers all networks read, or each network its own."""
        weight = (data.weight / data.weight.mean()).astype(np.float32)
        encoded = [self._encode(own, codes) for own in numbers]
        return Sample(
            Encoded(*(torch.cat(parts).to(self.device_) for parts in zip(*encoded, strict=True))),
            torch.from_numpy(data.target).to(self.device_),
            torch.from_numpy(weight).to(self.device_),
        )

    def _read(
        self, data: Labelled, settings: SizedSettings, folds: list[Fold], seed: int
    ) -> tuple[list[Tensor], Tensor]:
        """Learn the target's statistics; return `_inputs` of the rows, numbers by network."""
        values, categories = self.table_.values(data.frame)
        codes, numbers = self.table_.codes(categories), torch.from_numpy(values)
        levels = tuple(len(known) for known in self.table_.categories)
        many = tuple(j for j, count in enumerate(levels) if count >= MANY)
        self.statistics_ = TargetStatistics(many if self._has_mean(settings) else (), levels)
        if len(self.statistics_.columns) == 0:
            return [numbers], torch.from_numpy(codes)
        learnt = codes, data.target, data.weight / data.weight.mean()
        random = np.random.default_rng(seed)
        known = [self.statistics_.of_others(*learnt, fold.train, random) for fold in folds]
        self.statistics_.fit(*learnt)
        return [torch.cat([numbers, own], 1) for own in known], torch.from_numpy(codes)

    def _has_mean(self, settings: SizedSettings) -> bool:
        loss = self._loss()
        several = isinstance(loss, CrossEntropy) and loss.outputs > 2
        return settings.target_statistics and settings.columns == "own" and not several

    def _inputs(self, frame: Frame) -> tuple[Tensor, Tensor]:
        """Return numbers `[N, Fn]`, statistics of categories the last, and codes `[N, Fc]`."""
        values, categories = self.table_.values(frame)
        codes = torch.from_numpy(self.table_.codes(categories))
        return torch.cat([torch.from_numpy(values), self.statistics_(codes)], 1), codes

    def _encode(self, numbers: Tensor, codes: Tensor) -> Encoded:
        parts = (*self.encoder_(numbers), codes)
        return Encoded(*(part.T[None].contiguous() for part in parts))

    def _predict(self, x: Any) -> Array:
        """Return predictions `[N, P]` averaged over networks and members."""
        check_is_fitted(self)
        numbers, categories = self.table_.values(self.table_.frame(x, self))
        inputs = (torch.from_numpy(numbers), torch.from_numpy(self.table_.codes(categories)))
        served = self.served()
        with torch.no_grad(), threads(self.n_jobs):
            size = self.network_.rows_at_once()
            parts = zip(*(part.split(size) for part in inputs), strict=True)
            predictions: Array = torch.cat([served.average(*part) for part in parts]).numpy()
            return predictions

    def served(self) -> ServedTable:
        """Return a module from numbers `[N, Fn]` float64 and codes `[N, Fc]` to predictions.

        It scales the numbers itself, and is what exports hold: see `ServedTable`.
        """
        check_is_fitted(self)
        parts = (self.encoder_, self.statistics_, self.network_, self._loss())
        return ServedTable(*parts, *self._target_scale())

    def _rate_columns(self, rows: Encoded) -> None:
        """Keep the training rows' mean tokens and each column's mean share of predictions."""
        for name in ("baseline_", "feature_importances_"):
            self.__dict__.pop(name, None)
        if isinstance(self.network_.tokens, SharedTokens):
            return
        baseline = explain.mean_tokens(self.network_, rows)
        self.baseline_ = baseline.cpu()
        count = min(_EXPLAINED_ROWS, max(_EXPLAINED_AT_LEAST, self.network_.rows_at_once()))
        rating = np.abs(self._shares(rows.some(count), baseline)).mean(0)
        self.feature_importances_ = rating / max(rating.sum(), np.finfo(float).tiny)

    def explain(self, x: Any) -> Any:
        """Say what drove each row's prediction, column by column: integrated gradients.

        Classifiers explain the class that they predict, regressors their first output. Each row
        is compared with the mean row of the training rows, whatever other rows there are.

        Returns:
            A frame of the type of `x` with a column for each of the table's, `[N, F]`, in the order
            of fit; an array if `x` is no frame.
        """
        check_is_fitted(self)
        self._check_own_tokens("explain")
        frame = self.table_.frame(x, self)
        with threads(self.n_jobs):
            shares = self._shares(self._encode(*self._inputs(frame)), self.baseline_)
        return frame.like(shares)

    def selections(self, x: Any) -> Any:
        """Say how often sparse attention selects each column, row by row.

        A column's attention selects a few blocks of columns beside its own. The share is that of
        the columns of other blocks which select a column's block, averaged over heads, blocks of
        the network and networks. A column that nobody selects is still read: by its own block,
        through compressed blocks and in windows. What it all came to, `explain` says.

        Returns:
            A frame of the type of `x` as `explain` returns it, of shares in [0, 1].

        Raises:
            ValueError: nothing selects: the estimator has no sparse attention, or its columns make
                one block, or each selects its own block alone; or columns share tokens.
        """
        check_is_fitted(self)
        self._check_own_tokens("selections")
        settings, tokens = self.network_.settings, len(self._column_of())
        if settings.attention != "sparse" or settings.blocks == 0:
            raise ValueError(
                'selections needs attention="sparse" and a block of the network at least: nothing '
                "else selects"
            )
        if tokens <= settings.block:
            raise ValueError(
                f"selections needs several blocks, but {tokens} columns (statistics of categories "
                f"among them) are one block of {settings.block}; fit with a smaller block"
            )
        if settings.selected == 1:
            raise ValueError(
                "selections needs columns that select another block than their own; fit with a "
                "selected of 2 or more"
            )
        frame = self.table_.frame(x, self)
        with threads(self.n_jobs):
            rows = self._encode(*self._inputs(frame))
            shares = self._by_column(explain.selections(self.network_, rows))
        return frame.like(shares / np.bincount(self._column_of()))

    def _check_own_tokens(self, what: str) -> None:
        if isinstance(self.network_.tokens, SharedTokens):
            raise ValueError(f'{what} needs columns="own": shared tokens stand for no one column')

    def _shares(self, rows: Encoded, baseline: Tensor) -> Array:
        shares = explain.contributions(self.network_, rows, baseline, self._loss())
        return self._by_column(shares) * self._target_scale()[0]

    def _by_column(self, shares: Tensor) -> Array:
        """Return the sums `[N, F]` over each column's tokens of shares `[N, T]`."""
        by_column = np.zeros((len(shares), self.n_features_in_))
        np.add.at(by_column.T, self._column_of(), shares.cpu().double().numpy().T)
        return by_column

    def _column_of(self) -> list[int]:
        """Return the column of each token."""
        categorical = self.table_.categorical
        with_statistics = (categorical[j] for j in self.statistics_.columns)
        return [*self.table_.numeric, *with_statistics, *categorical]

    def save(self, folder: str | Path) -> None:
        """Write the fitted estimator into a new folder: safetensors and JSON, no pickle.

        A `random_state` that is a generator is left out.

        Raises:
            FileExistsError: `folder` exists and is not empty.
        """
        check_is_fitted(self)
        parameters = self.get_params(deep=False)
        if isinstance(self.random_state, np.random.RandomState):
            parameters["random_state"] = None
        content = {
            "kind": type(self).__name__,
            "parameters": parameters,
            "table": asdict(self.table_),
            "networks": len(self.network_.head),
            "network": asdict(self.network_.settings),
            "state": {name: getattr(self, name) for name in self._PLAIN if hasattr(self, name)},
        }
        weights = {f"network.{k}": v for k, v in self.network_.state_dict().items()}
        weights |= {f"encoder.{k}": v for k, v in self.encoder_.state_dict().items()}
        weights |= {f"statistics.{k}": v for k, v in self.statistics_.state_dict().items()}
        if hasattr(self, "baseline_"):
            weights["baseline"] = self.baseline_
        files.save(Path(folder), content, weights)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no estimator in `folder`.
            ValueError: it is of another class or format.
        """
        content, weights = files.load(Path(folder), cls.__name__)
        estimator = cls(**content["parameters"])
        estimator._set_table(Table.from_plain(content["table"]))
        for name in content["state"].keys() & set(cls._PLAIN):
            setattr(estimator, name, content["state"][name])
        estimator.device_ = torch.device("cpu")
        parts = {
            part: {k.partition(".")[2]: v for k, v in weights.items() if k.startswith(part)}
            for part in ("encoder", "statistics", "network")
        }
        estimator.encoder_ = NumericEncoder.from_state(parts["encoder"])
        estimator.statistics_ = TargetStatistics.from_state(parts["statistics"])
        network = estimator._network(content["networks"], SizedSettings(**content["network"]))
        network.load_state_dict(parts["network"])
        estimator.network_ = network.eval().requires_grad_(False)
        if "baseline" in weights:
            estimator.baseline_ = weights["baseline"]
        return estimator

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        tags.input_tags.string = True
        return tags


@contextmanager
def _own_random(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's generators; leave those of the CPU and of a CUDA device as they were."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        if cuda:  # and no other GPU
            torch.default_generator.manual_seed(seed)
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        yield


def _device(device: str) -> torch.device:
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
