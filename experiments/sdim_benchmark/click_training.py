"""One training step of the click model over whole users, against padded per-sample batches.

The padded form is how click models are usually trained: each sample comes with its own copy of the
history, padded to the longest, whose ids are embedded and whose collisions are masked; the sums
are one product of masks, which is faster than the lists of collisions of public code. Both sides
have the same parameters, head and loss. Batches lie on the device; a step is forward and backward,
from ids to the gradients of all parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from experiments.sdim_benchmark.clock import Clock
from experiments.sdim_benchmark.definitions import LIMITS, relative_error
from experiments.sdim_benchmark.measure import reason
from experiments.sdim_benchmark.rivals import masked_einsum
from hashtab.models.ctr import (
    ClickModel,
    ClickModelSettings,
    Feature,
    FeatureSpec,
    TensorBatch,
)


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Sizes of both batches.

    Args:
        users: of a whole-user batch.
        samples: of a padded batch.
        length: behaviours of a user, T.
        requests: of a user.
        candidates: of a request.
        items: ids of the item feature; a second feature has a hundredth.
        size: of an embedding.
    """

    users: int = 128
    samples: int = 1024
    length: int = 2000
    requests: int = 64
    candidates: int = 5
    items: int = 100_000
    size: int = 64

    @property
    def queries(self) -> int:
        return self.requests * self.candidates

    def tiny(self) -> Self:
        """Return a shape that any machine computes at once."""
        return replace(self, users=3, samples=8, length=30, requests=3, items=1000, size=16)


class PaddedBatch(NamedTuple):
    """Samples with a history each: ids `[S, L]`, 0 where `mask` `[S, L]` is false."""

    history: dict[str, Tensor]
    mask: Tensor
    candidates: dict[str, Tensor]
    labels: Tensor


def model_of(shape: StepShape, dtype: torch.dtype, device: torch.device) -> ClickModel:
    """Return a click model of 48 planes and three bits a group."""
    torch.manual_seed(0)
    features = tuple(
        Feature(name=name, kind="categorical", size=size)
        for name, size in (("item", shape.items), ("kind", max(2, shape.items // 100)))
    )
    settings = ClickModelSettings(
        embedding_size=shape.size, planes=48, tau=3, history_limit=None, dropout=0.0
    )
    model = ClickModel(FeatureSpec(behaviour=features, candidate=features), settings)
    return model.to(device, dtype)


def whole_users(shape: StepShape, device: torch.device) -> TensorBatch:
    """Draw a batch of whole users with uniform cuts."""
    torch.manual_seed(1)
    users, queries = shape.users, shape.queries

    def ids(n: int) -> dict[str, Tensor]:
        sizes = {"item": shape.items, "kind": max(2, shape.items // 100)}
        return {
            name: torch.randint(1, size, (n,), dtype=torch.int32) for name, size in sizes.items()
        }

    cuts = torch.randint(1, shape.length + 1, (users, shape.requests)).sort(1).values
    return TensorBatch(
        history_offsets=torch.arange(users + 1) * shape.length,
        behaviours=ids(users * shape.length),
        sample_offsets=torch.arange(users + 1) * queries,
        cuts=cuts.repeat_interleave(shape.candidates, dim=1).flatten(),
        candidates=ids(users * queries),
        context={},
        counters=torch.zeros(users * queries, 0),
        labels=torch.randint(0, 2, (users * queries,)).float(),
    ).to(device)


def padded(batch: TensorBatch, shape: StepShape, rows: Tensor) -> PaddedBatch:
    """Repeat the histories of the samples `rows` `[S]`."""
    mask = torch.arange(shape.length, device=rows.device) < batch.cuts[rows, None]
    user = rows // shape.queries
    return PaddedBatch(
        history={
            name: ids.view(shape.users, shape.length)[user] * mask
            for name, ids in batch.behaviours.items()
        },
        mask=mask,
        candidates={name: ids[rows] for name, ids in batch.candidates.items()},
        labels=batch.labels[rows],
    )


def padded_logits(model: ClickModel, batch: PaddedBatch) -> Tensor:
    """Return the logits `[S]` of the model, its history encoded for each sample."""
    history = model.objects(batch.history, model.features.behaviour)
    candidates = model.objects(batch.candidates, model.features.candidate)
    planes, tau = model.encoder.planes, model.settings.tau
    assert isinstance(planes, Tensor)
    interest = masked_einsum(history, candidates[:, None], planes, tau, batch.mask)
    return model.logits(candidates, interest[:, 0], None, None)


def step(model: ClickModel, logits: Callable[[], Tensor], labels: Tensor) -> None:
    """Compute the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    binary_cross_entropy_with_logits(logits(), labels).backward()


@dataclass(frozen=True)
class TrainingFigures:
    """Wall time of a step of each side, and its samples a second."""

    shape: StepShape
    milliseconds: dict[str, float]
    samples: dict[str, int]
    failures: dict[str, str]

    def rate(self, name: str) -> float:
        return self.samples[name] / self.milliseconds[name] * 1e3

    def best(self, side: str) -> str | None:
        """Return the fastest of the names that begin with `side`."""
        names = [name for name in self.milliseconds if name.startswith(side)]
        return max(names, key=self.rate, default=None)


def training(
    clock: Clock, shape: StepShape, dtype: torch.dtype, compiling: bool
) -> TrainingFigures:
    """Check that both sides give the same logits, then time a step of each."""
    torch.compiler.reset()
    model = model_of(shape, dtype, clock.device)
    whole = whole_users(shape, clock.device)
    n = len(whole.labels)
    rows = torch.linspace(0, n - 1, shape.samples, device=clock.device).long()
    each = padded(whole, shape, rows)
    sides: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "whole users": (lambda: model(whole), whole.labels),
        "padded samples": (lambda: padded_logits(model, each), each.labels),
    }
    if compiling:
        whole_compiled = torch.compile(model, dynamic=False)
        padded_compiled = torch.compile(padded_logits, dynamic=False)
        sides["whole users, compiled"] = (lambda: whole_compiled(whole), whole.labels)
        sides["padded samples, compiled"] = (lambda: padded_compiled(model, each), each.labels)
    found = TrainingFigures(shape, {}, {}, {})
    expected = padded_logits(model, each).detach()
    for name, (logits, labels) in sides.items():
        found.samples[name] = len(labels)
        try:
            _refuse_wrong(logits().detach(), expected, rows, dtype)
            found.milliseconds[name] = clock.wall_ms(lambda: step(model, logits, labels))  # noqa: B023  called at once
            print(f"  {name:<28} {found.rate(name):>12,.0f} samples/s", flush=True)
        except Exception as error:  # whatever a compiler or the device raises
            found.failures[name] = reason(error)
            print(f"  {name:<28} {found.failures[name]}", flush=True)
    return found


def _refuse_wrong(logits: Tensor, expected: Tensor, rows: Tensor, dtype: torch.dtype) -> None:
    mine = logits[rows] if len(logits) > len(rows) else logits
    error = relative_error(mine, expected.double())
    if not error <= LIMITS[dtype]:
        raise ArithmeticError(f"logits differ by {error:.2g}, limit {LIMITS[dtype]:.2g}")
