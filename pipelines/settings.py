"""Settings of one training: what decides its result, and where and how it runs."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hashtab.models.ctr import ClickModelSettings
from hashtab.pipelines.command_line import SettingsError, flatten
from hashtab.pipelines.places import DEFAULT_TRACKING


@dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """How a model is fitted.

    Args:
        learning_rate: of the network's weights.
        embedding_learning_rate: of the embeddings, which each sample touches a few rows of.
        weight_decay: of the network's weights (AdamW); embeddings have none.
        schedule: how the rates fall from their value to zero over all epochs.
        epochs: passes over the training samples at most.
        patience: stop after so many epochs without a better validation gAUC.
        samples_per_batch: samples of one step on average, shared by all workers, so that a training
            is the same whatever their number; users are never torn apart.
    """

    learning_rate: float = 7.5e-4
    embedding_learning_rate: float = 3.4e-2
    weight_decay: float = 0.0
    schedule: Literal["linear", "cosine"] = "linear"
    epochs: int = 3
    patience: int = 2
    samples_per_batch: int = 2048

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "embedding_learning_rate", "epochs", "patience")
        _positive(self, "samples_per_batch")
        if self.weight_decay < 0:
            raise SettingsError(f"weight_decay must not be negative, got {self.weight_decay}")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one training.

    `model`, `optimiser` and `seed`, together with the data, decide the result; the rest says where
    and how it runs.

    Args:
        data: folder of a prepared data set.
        model: the click model.
        optimiser: how it is fitted.
        seed: of initial weights, hash planes, the order of users and dropout.
        workers: of Ray Train; they share each batch. 0 trains in this process, without a cluster.
        threads: cores of a worker.
        gpu: train on GPUs, one a worker, in bfloat16 where that is safe, the model compiled.
        address: of a Ray cluster, for example auto. By default the cluster that the environment
            names, as within `ray job submit`, or else one of our own on this machine.
        max_failures: times that killed workers are started again from the last checkpoint.
        checkpoint_every: batches between checkpoints; one is also written after each epoch.
        storage: folder of all runs; every worker must see it and the data at the same path.
        run_name: name of the run and its folder; made of the encoder and a digest of data and
            settings by default.
        resume: go on with a run that was stopped.
        export: write the bundle of the trained model beside it, as export.py does.
        tracking_uri: of MLflow.
        experiment: of MLflow.
    """

    data: str = "data/complete_journey"
    model: ClickModelSettings = field(default_factory=ClickModelSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    seed: int = 0
    workers: int = 1
    threads: int = 1
    gpu: bool = False
    address: str | None = None
    max_failures: int = 3
    checkpoint_every: int = 200
    storage: str = "runs"
    run_name: str | None = None
    resume: bool = False
    export: bool = False
    tracking_uri: str = DEFAULT_TRACKING
    experiment: str = "hashtab"

    def __post_init__(self) -> None:
        _positive(self, "threads", "checkpoint_every")
        for name in ("seed", "workers", "max_failures"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.workers and self.optimiser.samples_per_batch % self.workers:
            raise SettingsError(
                "workers must divide optimiser.samples_per_batch, "
                f"got {self.workers} and {self.optimiser.samples_per_batch}"
            )
        chosen = self.run_name
        if chosen is not None and (chosen in ("", "..") or Path(chosen).name != chosen):
            raise SettingsError(f"run_name must be the name of a folder, got {chosen!r}")


def _positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise SettingsError(f"{name} must be positive, got {value}")


def identity(settings: TrainSettings, data_digest: str) -> dict[str, Any]:
    """Return what decides the result of a training, flat and as plain data."""
    decisive = {name: getattr(settings, name) for name in ("model", "optimiser")}
    plain = {
        f"{name}.{key}": v for name, part in decisive.items() for key, v in flatten(part).items()
    }
    return {**plain, "seed": settings.seed, "data digest": data_digest}


def run_name(settings: TrainSettings, data_digest: str) -> str:
    """Return the chosen name of a run, or one that no other training has."""
    return settings.run_name or digest_name(settings.model, identity(settings, data_digest))


def digest_name(model: ClickModelSettings, identity: dict[str, Any]) -> str:
    """Return a name for a person and for a machine: the encoder, and a digest of an identity."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    counters = "-counters" if model.counters else ""
    return f"{model.encoder}{counters}-{digest}"


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Say in words which of two identities' values differ; empty if none does."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names)
