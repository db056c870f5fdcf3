"""The checkpoint of a training: one file, replaced whole, refused by any other training.

It is a file of our own rather than Ray's, so that one form serves training in this process, any
number of workers and a driver that was killed, and nothing resumes unasked.
"""

import errno
import hashlib
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hashtab.pipelines.settings import differences

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written: says why, and what to do about it."""


class DiskFullError(CheckpointError):
    """A file that the disk has no room for."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one finished epoch came to.

    Args:
        number: from 1.
        loss: mean training loss, nats a sample.
        seconds: of training, without evaluation.
        samples_per_s: trained over all workers.
        validation: metrics by name.
    """

    number: int
    loss: float
    seconds: float
    samples_per_s: float
    validation: dict[str, float]

    @property
    def gauc(self) -> float:
        """Validation gAUC; below any other where no user has both classes."""
        return self.validation.get("gauc", float("-inf"))


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a training is, and what it has found.

    Args:
        batches: of an epoch, on each worker.
        batch: steps done in the epoch that is under way.
        loss: summed over the samples of those steps, over all workers.
        samples: of those steps, over all workers.
        seconds: that those steps took.
        total_seconds: of everything so far, evaluation included.
        epochs: finished ones.
        best: number of the one with the best validation gAUC, the earliest of equals.
        best_model: its state dict.
    """

    batches: int
    batch: int = 0
    loss: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    epochs: tuple[Epoch, ...] = ()
    best: int = 0
    best_model: dict[str, Tensor] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """Number of finished epochs, which is the index of the one under way."""
        return len(self.epochs)

    @property
    def step(self) -> int:
        """Optimiser steps since the beginning."""
        return self.epoch * self.batches + self.batch

    def waited(self) -> int:
        """Epochs since the best one."""
        return self.epoch - self.best

    def with_epoch(self, epoch: Epoch, model: nn.Module) -> "Progress":
        """Close an epoch; its weights are kept if they are the best so far."""
        found = replace(
            self, batch=0, loss=0.0, samples=0, seconds=0.0, epochs=(*self.epochs, epoch)
        )
        if self.best and epoch.gauc <= self.epochs[self.best - 1].gauc:
            return found
        state = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        return replace(found, best=epoch.number, best_model=state)


def planes_digest(model: nn.Module) -> str:
    """Return a digest of all hash planes of a model; of nothing where it hashes nothing."""
    digest = hashlib.sha256()
    for name, planes in model.state_dict().items():
        if name.rpartition(".")[2] == "planes":
            digest.update(planes.cpu().numpy().tobytes())
    return digest.hexdigest()


def save(
    path: Path,
    identity: dict[str, Any],
    progress: Progress,
    model: nn.Module,
    optimiser: Optimizer,
) -> None:
    """Write a checkpoint by temporary name and rename, so that a kill leaves the last one."""
    content = {
        "format": FORMAT,
        "identity": identity,
        "planes": planes_digest(model),
        "progress": asdict(replace(progress, best_model={})),
        "best_model": progress.best_model,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    write_atomically(path, content)


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """`torch.save` under a temporary name, then rename.

    Raises:
        DiskFullError: if the disk is full; nothing is left of what was written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if not _says_full(error):
            raise
        raise DiskFullError(
            f"{path} cannot be written, its disk is full: free some space and go on with --resume"
        ) from error


def _says_full(error: OSError | RuntimeError) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # What torch's writer of zip files makes of a short write; it does not say why.
    return "inline_container" in str(error) or "PytorchStreamWriter" in str(error)


def restore(
    path: Path,
    identity: dict[str, Any],
    batches: int,
    model: nn.Module,
    optimiser: Optimizer,
) -> Progress:
    """Load a checkpoint into model and optimiser; a training without one starts at its beginning.

    Args:
        path: of the checkpoint.
        identity: what decides the result of this training.
        batches: of an epoch of this training.
        model: freshly made from the settings and seed.
        optimiser: of its parameters.

    Raises:
        CheckpointError: if the checkpoint was written for other data, settings or hash planes, or
            cannot be read.
    """
    if not path.exists():
        return Progress(batches=batches)
    content = _read(path)
    _check(path, content, identity, batches, planes_digest(model))
    model.load_state_dict(content["model"])
    optimiser.load_state_dict(content["optimiser"])
    plain = content["progress"]
    plain["epochs"] = tuple(Epoch(**epoch) for epoch in plain["epochs"])
    return Progress(**{**plain, "best_model": content["best_model"]})


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise CheckpointError(
            f"{path} cannot be read ({reason}); if it is cut short or damaged, put a whole copy "
            "in its place, or remove it: --resume then trains from the beginning"
        ) from error
    return content


def _check(
    path: Path, content: dict[str, Any], identity: dict[str, Any], batches: int, planes: str
) -> None:
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {content.get('format')!r}, wanted {FORMAT}")
    differ = differences(content["identity"], identity)
    if not differ and content["planes"] != planes:
        differ = f"hash planes had digest {content['planes'][:12]}, now {planes[:12]}"
    before = content["progress"]["batches"]
    if not differ and before != batches:
        differ = f"batches an epoch were {before}, now {batches} (another number of workers)"
    if differ:
        raise CheckpointError(
            f"{path} belongs to another training: {differ}; "
            "give the settings and data of that one, or another --run_name"
        )
