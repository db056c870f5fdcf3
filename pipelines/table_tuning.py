"""A tuning of TabNSA on a table: trials on rows held out of training, best settings as YAML."""

import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar, Self

import numpy as np
import yaml

from hashtab.features.plain import build
from hashtab.features.storage import write_text
from hashtab.models.tabular.settings import NetworkSettings, TrainingSettings
from hashtab.pipelines.command_line import SettingsError, flatten
from hashtab.pipelines.places import DEFAULT_TRACKING
from hashtab.pipelines.run_folder import RunFolder
from hashtab.pipelines.search_space import Ranges, Values
from hashtab.pipelines.table_data import (
    LabelledTable,
    TableData,
    TableSettings,
    check_classes,
    held_out_rows,
    load,
)
from hashtab.pipelines.table_runs import TableTrainSettings, named_by_digest, table_identity
from hashtab.pipelines.tuning import FAILED, FINISHED, TuningError

_VALIDATION = 0.2  # share of the training rows that trials are compared on
_LONGEST_REASON = 500  # characters


@dataclass(frozen=True, kw_only=True)
class TableSearchSpace(Ranges):
    """Ranges to search for TabNSA. One that is empty is not searched: its base value stays.

    Args:
        learning_rate: the lowest and the highest, between which trials are log-uniform.
        weight_decay: the lowest and the highest, between which trials are log-uniform.
        dropout: the lowest and the highest, between which trials are uniform.
        width: values to choose from.
        mixer_width: values to choose from.
        bins: values to choose from.
        readout_width: values to choose from.

    Raises:
        SettingsError: if a range is reversed, or a value is out of its setting's range or named
            twice.
    """

    logarithmic: ClassVar[tuple[str, ...]] = ("learning_rate", "weight_decay")
    choices: ClassVar[tuple[str, ...]] = ("width", "mixer_width", "bins", "readout_width")

    learning_rate: tuple[float, ...] = (1e-3, 1e-2)
    weight_decay: tuple[float, ...] = (0.002, 0.1)
    dropout: tuple[float, ...] = (0.0, 0.4)
    width: tuple[int, ...] = (8, 16, 32)
    mixer_width: tuple[int, ...] = (16, 32, 64)
    bins: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    readout_width: tuple[int, ...] = (64, 128, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_all(("dropout",), lambda share: 0 <= share < 1, "be in [0, 1)")

    def draw(self, trials: int, seed: int) -> list[Values]:
        """Return the values of each trial after the first, which tries the base settings.

        Raises:
            SettingsError: if there is nothing to search, or not enough of it for so many trials.
        """
        names = tuple(f.name for f in fields(self) if getattr(self, f.name))
        if not names:
            raise SettingsError(
                "nothing to search: give a range, for example --space.learning_rate [1e-3,1e-2]"
            )
        return self.draw_of(names, trials - 1, seed) if trials > 1 else []


@dataclass(frozen=True, kw_only=True)
class TableTuneSettings:
    """Settings of one tuning on a table.

    `data`, `space`, `network`, `training`, `seed` and `trials` decide what is tried; the rest says
    where and how it runs.

    Args:
        data: the table; its rows to test on are never read.
        space: what is searched.
        network: what is not searched of the network.
        training: what is not searched of how it is trained.
        seed: of the rows held out, the trials' values, and each trial's training.
        trials: trainings to try; the first one has the settings as they are.
        workers: trials at a time, one core each; 0 tries them in this process.
        address: of a Ray cluster, for example auto.
        storage: folder of all runs; every worker must see it and the table at the same path.
        run_name: name of the tuning and its folder; made of the target and a digest of data and
            settings by default.
        resume: go on with a tuning that was stopped; trials that failed are tried again.
        tracking_uri: of MLflow.
        experiment: of MLflow.
    """

    data: TableSettings = field(default_factory=TableSettings)
    space: TableSearchSpace = field(default_factory=TableSearchSpace)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    seed: int = 0
    trials: int = 16
    workers: int = 2
    address: str | None = None
    storage: str = "runs"
    run_name: str | None = None
    resume: bool = False
    tracking_uri: str = DEFAULT_TRACKING
    experiment: str = "hashtab"

    def __post_init__(self) -> None:
        if self.trials < 1 or self.workers < 0:
            raise SettingsError(
                f"trials must be positive and workers not negative, got {self.trials}, "
                f"{self.workers}"
            )
        _ = [with_values(self.base, values) for values in self.space.draw(self.trials, self.seed)]

    @property
    def base(self) -> TableTrainSettings:
        """Settings of every trial but for what is searched."""
        # Workers have working directories of their own.
        file, test = _absolute(self.data.file), _absolute(self.data.test)
        return TableTrainSettings(
            data=replace(self.data, file=file, test=test),
            network=self.network,
            training=self.training,
            seed=self.seed,
            threads=1,
            storage=str(Path(self.storage).resolve()),
            run_name=self.run_name,
            resume=self.resume,
            tracking_uri=self.tracking_uri,
            experiment=self.experiment,
        )


def _absolute(pattern: str | None) -> str | None:
    return None if pattern is None else str(Path.cwd() / pattern)


def with_values(settings: TableTrainSettings, values: Values) -> TableTrainSettings:
    """Return settings with a trial's values in their places.

    Raises:
        ValueError: if a value is not one that its setting takes.
    """
    parts = {}
    for name in ("network", "training"):
        part = getattr(settings, name)
        own = {f.name for f in fields(part)}
        parts[name] = replace(part, **{key: v for key, v in values.items() if key in own})
    return replace(settings, **parts)


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What a trial came to.

    Args:
        loss: mean over the validation rows, log loss, squared error or pinball loss; None where it
            failed.
        metrics: of the validation rows.
        epochs: of the training.
        seconds: of the training.
        failure: why it failed; None where it did not.
    """

    loss: float | None
    metrics: dict[str, float]
    epochs: int
    seconds: float
    failure: str | None = None


@dataclass(frozen=True)
class TableTrial(RunFolder):
    """One training of a tuning.

    Args:
        folder: absolute, named as the trial.
        settings: of the training.
        values: of the searched settings.
    """

    script: ClassVar[str] = "pipelines/tune.py"

    settings: TableTrainSettings
    values: Values = field(default_factory=dict)

    @property
    def result(self) -> TrialResult:
        """What the trial came to, once it has ended."""
        result: TrialResult = build(TrialResult, self.read_result(), "result")
        return result

    @property
    def state(self) -> str:
        """How a trial with a result ended."""
        return FINISHED if self.result.failure is None else FAILED


@dataclass(frozen=True)
class TableTuning(RunFolder):
    """The folder of a tuning, itself a run in MLflow, with its trials' folders in it.

    Args:
        folder: absolute, named as the tuning.
        settings: of every trial but for what is searched.
        chosen: settings of the tuning.
    """

    work: ClassVar[str] = "tuning"
    script: ClassVar[str] = "pipelines/tune.py"

    settings: TableTrainSettings
    chosen: TableTuneSettings

    @classmethod
    def find(cls, chosen: TableTuneSettings, data: TableData) -> Self:
        """Return the tuning of these settings and data, whether it was begun or not.

        Raises:
            SettingsError: if its folder holds another tuning.
        """
        # Sizes that go by the rows are written out: trials are compared by them.
        settings = replace(chosen.base, network=chosen.network.sized(len(data.train)))
        decisive = tuning_identity(chosen, data)
        name = chosen.run_name or named_by_digest("tune-tabnsa", str(chosen.data.target), decisive)
        tuning = cls(Path(settings.storage) / name, settings, chosen)
        tuning.refuse_another(decisive)
        return tuning

    @property
    def trials(self) -> list[TableTrial]:
        """All trials in the order in which they are tried."""
        chosen = self.chosen
        first = {f.name: self._base_value(f.name) for f in fields(chosen.space)}
        searched = {name: v for name, v in first.items() if getattr(chosen.space, name)}
        drawn = [searched, *chosen.space.draw(chosen.trials, chosen.seed)]
        return [
            TableTrial(
                self.folder / "trials" / f"trial-{number:02d}",
                with_values(self.settings, values),
                values,
            )
            for number, values in enumerate(drawn, start=1)
        ]

    def _base_value(self, name: str) -> Any:
        for part in (self.settings.network, self.settings.training):
            if hasattr(part, name):
                return getattr(part, name)
        raise AssertionError(name)

    @property
    def ranking(self) -> list[TableTrial]:
        """Trials with a loss, the lowest first; of equals the one tried first."""
        ended = [trial for trial in self.trials if trial.finished and trial.result.loss is not None]
        return sorted(ended, key=lambda trial: trial.result.loss or 0.0)

    @property
    def best_settings(self) -> Path:
        """YAML file of the best settings, as `train_tabnsa.py --config` takes it."""
        return self.folder / "best.yaml"

    def conclude(self) -> None:
        """Write the best settings.

        Raises:
            TuningError: if no trial has a loss.
        """
        if not self.ranking:
            first = self.trials[0].result
            raise TuningError(
                f"all {self.chosen.trials} trials failed, the first so: {first.failure}; they lie "
                f"in {self.folder}, and --resume tries them again"
            )
        best = self.ranking[0]
        parts = {name: asdict(getattr(best.settings, name)) for name in ("network", "training")}
        data = {name: value for name, value in flatten(self.settings.data).items() if value}
        text = yaml.safe_dump({"data": data, **parts, "seed": self.chosen.seed}, sort_keys=False)
        found = f"validation loss {best.result.loss:.4g} at seed {self.chosen.seed}"
        write_text(self.best_settings, f"# {best.name} of {self.name}: {found}\n{text}")


def tuning_identity(chosen: TableTuneSettings, data: TableData) -> dict[str, Any]:
    """Return what decides the trials of a tuning, flat and as plain data."""
    space = {f"space.{name}": values for name, values in flatten(chosen.space).items()}
    return {**table_identity(chosen.base, data), **space, "trials": chosen.trials}


@dataclass(frozen=True)
class Try:
    """Tries trials by their numbers, in any process that sees table and folder.

    Args:
        trials: of the tuning.
    """

    trials: tuple[TableTrial, ...]

    def __call__(self, number: int) -> list[str]:
        """Try one trial; does nothing where it has a result. Returns a line for the person."""
        trial = self.trials[number]
        if not trial.finished:
            trial.write_result(asdict(_tried(trial.settings)))
        found = trial.result
        values = ", ".join(f"{key} {value}" for key, value in trial.values.items())
        said = f"loss {found.loss:.4g}" if found.loss is not None else f"failed: {found.failure}"
        return [f"{trial.name} of {len(self.trials)}  {said}, {found.seconds:.0f} s: {values}"]


def _tried(settings: TableTrainSettings) -> TrialResult:
    """Train on a part of the training rows, and compare on the others."""
    # Torch and scikit-learn are slow to import, and the driver needs neither.
    from hashtab.pipelines.table_metrics import losses, metrics
    from hashtab.pipelines.table_training import fit, predictions

    begun = time.perf_counter()
    try:
        inner, held_out = part(load(settings.data, settings.seed), settings.seed)
        estimator = fit(settings, inner)
        predicted = predictions(estimator, held_out)
        classes = getattr(estimator, "classes_", None)
        found = (held_out.target, predicted, classes, inner.quantiles)
        return TrialResult(
            loss=_finite(float(losses(*found).mean())),
            metrics=metrics(*found),
            epochs=estimator.n_iter_,
            seconds=time.perf_counter() - begun,
        )
    except Exception as error:  # one trial that cannot be trained does not end the others
        reason = shorten(f"{type(error).__name__}: {error}", _LONGEST_REASON)
        seconds = time.perf_counter() - begun
        return TrialResult(loss=None, metrics={}, epochs=0, seconds=seconds, failure=reason)


def _finite(loss: float) -> float:
    if not np.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    return loss


def part(data: TableData, seed: int) -> tuple[TableData, LabelledTable]:
    """Hold rows out of those to learn from; the rows to test on are left alone.

    Where rows are in time order these are the latest ones.

    Raises:
        DataError: if they have a class that no trial would learn.
    """
    table = data.train
    if data.ordered:
        mask = np.arange(len(table)) >= round(len(table) * (1 - _VALIDATION))
    else:
        mask = held_out_rows(table.target, data.task, _VALIDATION, seed)
    inner, held_out = table.take(np.flatnonzero(~mask)), table.take(np.flatnonzero(mask))
    check_classes(inner, held_out, data.task, "the rows that trials are compared on")
    return replace(data, train=inner), held_out


def forget_failures(trials: list[TableTrial]) -> None:
    """Remove the results of trials that failed, so that they are tried again."""
    for trial in trials:
        if trial.finished and trial.result.failure is not None:
            trial.forget_result()
