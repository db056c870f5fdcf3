"""One epoch of the click model on a GPU, by the Triton kernels and by definition.

All sides start from the same weights and planes and see the same batches in the same order, with
the optimiser of train_sdim.py at its defaults and rates that fall to zero over the epoch:

    definition, float32      the PyTorch definition of the history encoder, eager, no autocast
    another dropout          the same with other dropout masks: how far chance alone leads
    definition, bfloat16     the definition under autocast, whose codes are those of the kernels
    kernels, bfloat16        Triton kernels under autocast, in one compiled graph

A compiled graph draws its dropout in another way, so at a dropout above 0 the kernels' curve is
one of other masks too, to be held against the second side; with --dropout 0 nothing but rounding
is left between the sides. Validation is scored in float32, as models are served. Figures of speed
leave out the first steps, in which graphs are compiled; batches come from memory and are checked
and copied to the device as in training.

    python experiments/compare_gpu_training.py --prepare data/complete_journey --file epoch.npz
    python experiments/compare_gpu_training.py --file epoch.npz --output folder [--dropout 0]

The first needs the project's loader, the second torch, triton and NumPy (matplotlib for a plot).
"""

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.features.metrics import gauc
from hashtab.models.ctr import ClickModel, ClickModelSettings, FeatureSpec, TensorBatch
from hashtab.models.ctr.encoders import HashSampledAttention, TargetAttention
from hashtab.models.ctr.on_gpu import compiled

SPLITS = ("train", "validation")
PLACES = ("behaviours", "candidates", "context")
WARM_SHARE = 0.1  # of an epoch's steps, left out of figures of speed


@dataclass(frozen=True)
class Side:
    """One way to compute the same training."""

    name: str
    impl: str = "reference"
    rounded: bool = False
    compiled: bool = False
    seed: int = 0


REFERENCE = Side("definition, float32")
CHANCE = Side("another dropout", seed=1)
SIDES = (
    REFERENCE,
    CHANCE,
    Side("definition, bfloat16", rounded=True),
    Side("kernels, bfloat16", impl="triton", rounded=True, compiled=True),
)


@dataclass(frozen=True)
class Epoch:
    """Stored batches of both splits, and what the project trains them with by default."""

    arrays: dict[str, NDArray[Any]]
    features: FeatureSpec
    model: ClickModelSettings
    optimiser: dict[str, float]

    @classmethod
    def read(cls, file: Path) -> "Epoch":
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
        meaning = json.loads(str(arrays.pop("meaning")))
        model = {**meaning["model"], "hidden": tuple(meaning["model"]["hidden"])}
        features = FeatureSpec.from_dict(meaning["features"])
        return cls(arrays, features, ClickModelSettings(**model), meaning["optimiser"])

    def batches(self, split: str, joined: int = 1) -> list[TensorBatch]:
        """Return the batches of a split, so many of the stored ones in each."""
        users = self.arrays[f"{split}/users"]
        ends = np.append(np.arange(joined, len(users), joined), len(users))
        edges = np.append(0, users.cumsum()[ends - 1])
        return [self._batch(split, int(first), int(last)) for first, last in pairwise(edges)]

    def _batch(self, split: str, first: int, last: int) -> TensorBatch:
        """Return users `first` up to `last` of a split."""
        seen = self.arrays[f"{split}/history_offsets"][first : last + 1]
        asked = self.arrays[f"{split}/sample_offsets"][first : last + 1]
        samples = slice(asked[0], asked[-1])

        def columns(place: str) -> dict[str, NDArray[Any]]:
            rows = slice(seen[0], seen[-1]) if place == "behaviours" else samples
            begin = f"{split}/{place}/"
            names = [name for name in self.arrays if name.startswith(begin)]
            return {name.removeprefix(begin): self.arrays[name][rows] for name in names}

        plain = {place: _tensors(columns(place)) for place in PLACES}
        return TensorBatch(
            history_offsets=torch.from_numpy(seen - seen[0]),
            sample_offsets=torch.from_numpy(asked - asked[0]),
            cuts=torch.from_numpy(self.arrays[f"{split}/cuts"][samples].astype(np.int64)),
            counters=torch.from_numpy(self.arrays[f"{split}/counters"][samples]),
            labels=torch.from_numpy(self.arrays[f"{split}/labels"][samples].astype(np.float32)),
            **plain,
        )


def _tensors(columns: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def prepare(data: Path, file: Path, samples_per_batch: int | None = None) -> None:
    """Store one epoch of a prepared data set's batches, in the order that training takes them in.

    Args:
        data: folder of the data set.
        file: `.npz` to write.
        samples_per_batch: on average; that of train_sdim.py when None.
    """
    # Here alone, for they need Polars.
    from hashtab.features.dataset import Dataset
    from hashtab.pipelines.settings import OptimiserSettings
    from hashtab.pipelines.training import seed_of

    dataset, model, optimiser = Dataset.open(data), ClickModelSettings(), OptimiserSettings()
    size, limit = samples_per_batch or optimiser.samples_per_batch, model.history_limit
    meaning = {
        "features": asdict(dataset.manifest.features),
        "model": asdict(model),
        "optimiser": asdict(optimiser),
    }
    orders = {"train": seed_of(0, 0), "validation": None}
    arrays = {"meaning": np.array(json.dumps(meaning))}
    for split in SPLITS:
        batches = list(dataset.batches(split, size, limit, shuffle_seed=orders[split]))
        arrays |= {f"{split}/{name}": value for name, value in _joined(batches).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # names are no options
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def _joined(batches: list[Any]) -> dict[str, NDArray[Any]]:
    """Join batches as the loader gives them, and keep how many users each had."""

    def offsets(name: str) -> NDArray[np.int64]:
        lengths = np.concatenate([np.diff(getattr(batch, name)) for batch in batches])
        return np.append(0, lengths.cumsum())

    def rows(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(batch, name) for batch in batches])

    found: dict[str, NDArray[Any]] = {
        "users": np.array([len(batch.users) for batch in batches]),
        "history_offsets": offsets("history_offsets"),
        "sample_offsets": offsets("sample_offsets"),
        "cuts": rows("cuts").astype(np.int32),
        "counters": rows("counters"),
        "labels": rows("labels").astype(np.uint8),
    }
    for place in PLACES:
        for name in getattr(batches[0], place):
            parts = [getattr(batch, place)[name] for batch in batches]
            found[f"{place}/{name}"] = np.concatenate(parts)
    return found


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one side came to.

    Args:
        name: of the side.
        losses: mean loss of each step, nats a sample.
        samples: of each step.
        samples_per_s: without the first steps.
        first_steps_s: seconds of those.
        validation: metrics by name.
    """

    name: str
    losses: NDArray[np.float64]
    samples: NDArray[np.int64]
    samples_per_s: float
    first_steps_s: float
    validation: dict[str, float]

    def mean(self, share: float = 1.0) -> float:
        """Return the mean loss a sample over the last `share` of the steps."""
        last = slice(len(self.losses) - max(1, round(share * len(self.losses))), None)
        return float(np.average(self.losses[last], weights=self.samples[last]))


def train(side: Side, epoch: Epoch, device: torch.device, joined: int = 1) -> Outcome:
    """Train one epoch by one side, from the same weights for all sides."""
    torch.manual_seed(0)
    model = ClickModel(epoch.features, epoch.model).to(device).train()
    _choose(model, side.impl)
    forward = compiled(model) if side.compiled else model
    optimiser = _optimiser(model, epoch.optimiser)
    batches = epoch.batches("train", joined)
    warm = max(1, round(WARM_SHARE * len(batches)))
    clock = [_now(device)]
    losses = []
    for i, batch in enumerate(batches):
        _fall(optimiser, 1 - i / len(batches))
        torch.manual_seed(side.seed * len(batches) + i)
        losses.append(_step(forward, optimiser, side, batch.to(device)))
        if i + 1 == warm:
            clock.append(_now(device))
    clock.append(_now(device))
    samples = np.array([len(batch.labels) for batch in batches])
    return Outcome(
        name=side.name,
        losses=torch.stack(losses).double().cpu().numpy(),
        samples=samples,
        samples_per_s=float(samples[warm:].sum() / (clock[2] - clock[1])),
        first_steps_s=clock[1] - clock[0],
        validation=_validate(model, epoch, device),
    )


def _step(
    forward: nn.Module, optimiser: torch.optim.Optimizer, side: Side, batch: TensorBatch
) -> Tensor:
    """Take one step; return its mean loss, which stays on the device."""
    with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=side.rounded):
        logits = forward(batch)
    loss = binary_cross_entropy_with_logits(logits, batch.labels)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss.detach()


def _choose(model: ClickModel, impl: str) -> None:
    for module in model.modules():
        if isinstance(module, HashSampledAttention | TargetAttention):
            module.impl = impl  # type: ignore[assignment]  # one that both kernels have


def _optimiser(model: ClickModel, rates: dict[str, float]) -> torch.optim.Optimizer:
    names = ("learning_rate", "embedding_learning_rate", "weight_decay")
    groups = model.parameter_groups(*(rates[name] for name in names))
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


def _fall(optimiser: torch.optim.Optimizer, left: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = left * group["initial_lr"]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def _validate(model: ClickModel, epoch: Epoch, device: torch.device) -> dict[str, float]:
    """Score the validation split in float32, all sides by what evaluation would choose."""
    _choose(model.eval(), "auto")
    batches = epoch.batches("validation")
    logits = torch.cat([model(batch.to(device)).double() for batch in batches]).cpu()
    labels = torch.cat([batch.labels for batch in batches]).double()
    samples = np.diff(epoch.arrays["validation/sample_offsets"])
    users = np.repeat(np.arange(len(samples)), samples)
    return {
        "log_loss": binary_cross_entropy_with_logits(logits, labels).item(),
        "gauc": gauc(labels.numpy(), logits.numpy(), users),
    }


def against(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    """Return how one side's curve lies against another's."""
    apart = outcome.losses - reference.losses
    return {
        "mean_loss": outcome.mean() - reference.mean(),
        "last_tenth": outcome.mean(0.1) - reference.mean(0.1),
        "rms_of_a_step": math.sqrt(float(np.square(apart).mean())),
        "largest_of_a_step": float(np.abs(apart).max()),
        "validation_log_loss": outcome.validation["log_loss"] - reference.validation["log_loss"],
        "validation_gauc": outcome.validation["gauc"] - reference.validation["gauc"],
    }


def report(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield the lines of both tables: the sides, and each against the first."""
    yield (
        f"{'side':<22}{'mean loss':>11}{'last tenth':>12}{'val log loss':>14}{'val gAUC':>10}"
        f"{'samples/s':>13}{'first steps':>13}"
    )
    for o in outcomes:
        yield (
            f"{o.name:<22}{o.mean():>11.5f}{o.mean(0.1):>12.5f}{o.validation['log_loss']:>14.5f}"
            f"{o.validation['gauc']:>10.4f}{o.samples_per_s:>13,.0f}{o.first_steps_s:>11.1f} s"
        )
    yield ""
    yield f"less {outcomes[0].name}:"
    for o in outcomes[1:]:
        apart = against(o, outcomes[0])
        figures = ", ".join(f"{name} {value:+.5f}" for name, value in apart.items())
        yield f"  {o.name}: {figures}"


def write(outcomes: list[Outcome], facts: dict[str, Any], folder: Path) -> None:
    """Write curves, figures and, where matplotlib is there, a plot."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "losses.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["step", "samples", *(o.name for o in outcomes)])
        for i, n in enumerate(outcomes[0].samples):
            rows.writerow([i + 1, n, *(f"{o.losses[i]:.6f}" for o in outcomes)])
    figures = {
        o.name: {
            "mean_loss": o.mean(),
            "last_tenth": o.mean(0.1),
            "samples_per_s": o.samples_per_s,
            "first_steps_s": o.first_steps_s,
            "validation": o.validation,
            "less_reference": against(o, outcomes[0]),
        }
        for o in outcomes
    }
    content = json.dumps({**facts, "sides": figures}, indent=2)
    (folder / "figures.json").write_text(content + "\n")
    try:
        plot(outcomes, folder / "losses.svg")
    except ModuleNotFoundError as error:
        print(f"no plot: {error}")


def plot(outcomes: list[Outcome], file: Path) -> None:
    """Draw the smoothed curves, and below them their differences from the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    width = max(1, len(outcomes[0].losses) // 40)
    steps = np.arange(width, len(outcomes[0].losses) + 1)
    first = _smooth(outcomes[0].losses, width)
    for i, o in enumerate(outcomes):
        smooth = _smooth(o.losses, width)
        upper.plot(steps, smooth, color=f"C{i}", linewidth=1.2, label=o.name)
        if i:
            lower.plot(steps, smooth - first, color=f"C{i}", linewidth=1.2)
    lower.axhline(0, color="grey", linewidth=0.8)
    upper.set_ylabel(f"loss, mean of {width} steps")
    lower.set_ylabel(f"less {outcomes[0].name}")
    lower.set_xlabel("step")
    upper.legend(frameon=False)
    figure.savefig(file)


def _smooth(losses: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    return np.convolve(losses, np.full(width, 1 / width), "valid")


def changed(epoch: Epoch, given: argparse.Namespace) -> Epoch:
    """Return the epoch with the settings that were given."""
    names = ("encoder", "planes", "tau", "dropout", "history_limit")
    wanted = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if wanted.get("history_limit") == 0:
        wanted["history_limit"] = None
    return replace(epoch, model=replace(epoch.model, **wanted))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, required=True, help=".npz of an epoch")
    parser.add_argument("--prepare", type=Path, help="write the file from this prepared data set")
    parser.add_argument("--output", type=Path, help="folder of curves and figures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--joined", type=int, default=1, help="stored batches in one step")
    names = [side.name for side in SIDES]
    parser.add_argument("--sides", nargs="+", choices=names, default=names, metavar="SIDE")
    parser.add_argument("--encoder")
    for name in ("--planes", "--tau"):
        parser.add_argument(name, type=int)
    parser.add_argument("--history-limit", type=int, help="0 for none")
    parser.add_argument("--dropout", type=float)
    return parser.parse_args(arguments)


def on_this_machine(side: Side, device: torch.device) -> Side:
    """Return the side as it runs on a GPU, or to try the program on a CPU."""
    return side if device.type == "cuda" else replace(side, impl="auto", compiled=False)


def run(given: argparse.Namespace, say: Callable[[str], None] = print) -> list[Outcome]:
    """Train by the sides asked for, print and write what they came to."""
    device = torch.device(given.device)
    epoch = changed(Epoch.read(given.file), given)
    outcomes: list[Outcome] = []
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "model": asdict(epoch.model),
        "joined": given.joined,
    }
    say(f"{facts['device']}, torch {facts['torch']}, {epoch.model}")
    for side in SIDES:
        if side.name in given.sides:
            outcomes.append(train(on_this_machine(side, device), epoch, device, given.joined))
            say(f"{side.name}: mean loss {outcomes[-1].mean():.5f}")
            if given.output:
                write(outcomes, facts, given.output)
    for line in report(outcomes):
        say(line)
    return outcomes


if __name__ == "__main__":
    settings = parse()
    if settings.prepare:
        prepare(settings.prepare, settings.file)
    else:
        run(settings)
