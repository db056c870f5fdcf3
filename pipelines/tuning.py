"""One tuning: its settings, its folder, its trials, and what came out of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from hashtab.features.manifest import Manifest
from hashtab.features.storage import write_text
from hashtab.models.ctr import ClickModelSettings
from hashtab.pipelines.checkpoints import Epoch
from hashtab.pipelines.command_line import SettingsError, flatten
from hashtab.pipelines.places import DEFAULT_TRACKING
from hashtab.pipelines.runs import Result, Run, absolute
from hashtab.pipelines.search_space import SearchSpace, Values, with_values
from hashtab.pipelines.settings import OptimiserSettings, TrainSettings, digest_name, identity

FINISHED, STOPPED_EARLY, FAILED = "finished", "stopped early", "failed"


class TuningError(ValueError):
    """A tuning that came to nothing: says why."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """Settings of one tuning.

    `model`, `optimiser`, `space`, `seed` and `trials`, together with the data, decide what is
    tried; the rest says where and how it runs.

    Args:
        data: folder of a prepared data set; its test split is never read.
        space: what is searched.
        model: what is not searched of the click model.
        optimiser: what is not searched of how it is fitted.
        seed: of the trials' values, and of each trial's training.
        trials: trainings to try.
        workers: trials at a time, one core each.
        address: of a Ray cluster, for example auto. By default the cluster that the environment
            names, as within `ray job submit`, or else one of our own on this machine.
        storage: folder of all runs; every worker must see it and the data at the same path.
        run_name: name of the tuning and its folder; made of the encoder and a digest of data and
            settings by default.
        resume: go on with a tuning that was stopped; trials that failed are tried again.
        tracking_uri: of MLflow.
        experiment: of MLflow.

    Raises:
        SettingsError: if a setting is out of its range, or there is too little to search.
    """

    data: str = "data/complete_journey"
    space: SearchSpace = field(default_factory=SearchSpace)
    model: ClickModelSettings = field(default_factory=ClickModelSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
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
        for name in ("trials", "workers"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be positive, got {getattr(self, name)}")
        base = self.base  # made here, so that what a training refuses is refused here
        self.space.draw(base.model.encoder, self.trials, self.seed)

    @property
    def base(self) -> TrainSettings:
        """Settings of every trial but for what is searched."""
        return TrainSettings(
            data=self.data,
            model=self.model,
            optimiser=self.optimiser,
            seed=self.seed,
            storage=self.storage,
            run_name=self.run_name,
            resume=self.resume,
            tracking_uri=self.tracking_uri,
            experiment=self.experiment,
        )


def tuning_identity(settings: TuneSettings, data_digest: str) -> dict[str, Any]:
    """Return what decides the trials of a tuning, flat and as plain data."""
    space = {f"space.{name}": values for name, values in flatten(settings.space).items()}
    return {**identity(settings.base, data_digest), **space, "trials": settings.trials}


@dataclass(frozen=True)
class Trial:
    """One training of a tuning.

    Args:
        values: of the searched settings.
        run: its folder and settings.
    """

    values: Values
    run: Run

    @property
    def name(self) -> str:
        """Name of the trial, which tells its number."""
        return self.run.name

    @property
    def state(self) -> str:
        """How a trial with a result ended."""
        result, settings = self.run.result, self.run.settings.optimiser
        epochs = len(result.epochs)
        whole = epochs == settings.epochs or epochs - result.best_epoch >= settings.patience
        return FINISHED if whole else STOPPED_EARLY

    @property
    def best(self) -> Epoch:
        """The epoch with the best validation gAUC of a trial with a result."""
        return self.run.result.epochs[self.run.result.best_epoch - 1]

    def finish(self, epochs: Sequence[Epoch], seconds: float) -> None:
        """Store what the trial came to; its checkpoint is needed no more."""
        best = max(epochs, key=gauc)  # the earliest of equals
        self.run.finish(
            Result(
                name=self.name,
                best_epoch=best.number,
                epochs=tuple(epochs),
                metrics={"validation": best.validation},
                seconds=seconds,
            )
        )
        self.run.checkpoint.unlink(missing_ok=True)


def gauc(epoch: Epoch) -> float:
    """Validation gAUC; 0, the worst there is, where the model came to no number."""
    return epoch.gauc if epoch.gauc >= 0 else 0.0  # which NaN is not


@dataclass(frozen=True)
class Tuning(Run):
    """The folder of a tuning, itself a run in MLflow, with its trials' folders in it.

    Args:
        folder: absolute, named as the tuning.
        settings: of every trial but for what is searched, with absolute paths.
        chosen: settings of the tuning.
    """

    work: ClassVar[str] = "tuning"

    chosen: TuneSettings

    @classmethod
    def find(cls, settings: TuneSettings, manifest: Manifest) -> Self:
        """Return the tuning of these settings and data, whether it was begun or not.

        Raises:
            SettingsError: if its folder holds another tuning.
        """
        base = absolute(settings.base)
        decisive = tuning_identity(settings, manifest.digest)
        name = settings.run_name or f"tune-{digest_name(settings.model, decisive)}"
        tuning = cls(Path(base.storage) / name, base, settings)
        tuning.check_identity(manifest)
        return tuning

    @property
    def finished(self) -> bool:
        """Whether the tuning is over, without a trial that failed."""
        return self.published

    def identity(self, manifest: Manifest) -> dict[str, Any]:
        """Return what decides the trials, flat and as plain data."""
        return tuning_identity(self.chosen, manifest.digest)

    @property
    def trials(self) -> list[Trial]:
        """All trials in the order in which they are tried."""
        chosen = self.chosen
        drawn = chosen.space.draw(chosen.model.encoder, chosen.trials, chosen.seed)
        return [self._trial(f"trial-{number:02d}", v) for number, v in enumerate(drawn, start=1)]

    def _trial(self, name: str, values: Values) -> Trial:
        folder = self.folder / "trials"
        placed = replace(self.settings, storage=str(folder), run_name=name)
        return Trial(values, Run(folder / name, with_values(placed, values)))

    @property
    def tried(self) -> bool:
        """Whether every trial has a result."""
        return all(trial.run.finished for trial in self.trials)

    @property
    def ranking(self) -> list[Trial]:
        """Trials with a result, the best validation gAUC first; of equals the one tried first."""
        ended = [trial for trial in self.trials if trial.run.finished]
        return sorted(ended, key=lambda trial: gauc(trial.best), reverse=True)

    @property
    def best_settings(self) -> Path:
        """YAML file of the best settings, as `train_sdim.py --config` takes it."""
        return self.folder / "best.yaml"

    def conclude(self, failures: Mapping[str, str]) -> None:
        """Write the best settings.

        Args:
            failures: name of a trial -> why it failed.

        Raises:
            TuningError: if no trial has a result.
        """
        if not self.ranking:
            name = min(failures)
            raise TuningError(
                f"all {len(failures)} trials failed, {name} so: {failures[name]}; "
                f"they lie in {self.folder}, and --resume tries them again"
            )
        best = self.ranking[0]
        parts = {name: asdict(getattr(best.run.settings, name)) for name in ("model", "optimiser")}
        parts["model"]["hidden"] = list(parts["model"]["hidden"])
        text = yaml.safe_dump({"data": self.settings.data, **parts}, sort_keys=False)
        found = f"validation gAUC {best.best.gauc:.4f} at seed {self.settings.seed}"
        write_text(self.best_settings, f"# {best.name} of {self.name}: {found}\n{text}")
