"""What a click model reads: the features it embeds and a ragged batch of whole users."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor

from hashtab.kernels.core.checks import check_cuts, check_offsets
from hashtab.kernels.core.ragged import segment_of


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One input column.

    Args:
        name: column name; a behaviour's and a candidate's feature of one name share one table,
            the context has tables of its own.
        kind: `"categorical"` (ids: 0 padding, 1 unknown, then the known values) or `"numeric"`.
        size: number of ids of a categorical feature, 1 for a numeric one.
    """

    name: str
    kind: Literal["categorical", "numeric"]
    size: int

    def __post_init__(self) -> None:
        if self.kind not in ("categorical", "numeric"):
            raise ValueError(f"kind must be 'categorical' or 'numeric', got {self.kind=}")
        if self.size < 1:
            raise ValueError(f"size of feature {self.name!r} must be positive, got {self.size=}")


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """The features of one data set, by where they appear.

    Args:
        behaviour: features of each past behaviour.
        candidate: features of the item to score.
        context: what is known at request time.
        counters: names of the counted features, in the order of the counter columns.
    """

    behaviour: tuple[Feature, ...]
    candidate: tuple[Feature, ...]
    context: tuple[Feature, ...] = ()
    counters: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> Self:
        """Build the spec from plain data, as `dataclasses.asdict` or a JSON file gives it."""
        places = {
            place: tuple(Feature(**feature) for feature in spec[place])
            for place in ("behaviour", "candidate", "context")
        }
        return cls(**places, counters=tuple(spec["counters"]))


@dataclass(frozen=True, kw_only=True)
class TensorBatch:
    """Whole users as tensors: each history once, all samples of its user beside it.

    Shapes: B users, N behaviours, Q samples, K counters. Offsets and cuts are int64, ids int32,
    the rest float32.

    Args:
        history_offsets: `[B + 1]`, where each user's behaviours begin and end.
        behaviours: feature name -> `[N]`, in time order within a user.
        sample_offsets: `[B + 1]`, where each user's samples begin and end.
        cuts: `[Q]`, ascending within a user: a sample sees its user's first `cuts[i]` behaviours.
        candidates: feature name -> `[Q]`.
        context: feature name -> `[Q]`.
        counters: `[Q, K]`, log(1 + count before the cut).
        labels: `[Q]`, 0 or 1.
    """

    history_offsets: Tensor
    behaviours: dict[str, Tensor]
    sample_offsets: Tensor
    cuts: Tensor
    candidates: dict[str, Tensor]
    context: dict[str, Tensor]
    counters: Tensor
    labels: Tensor

    @classmethod
    def from_numpy(cls, batch: Any) -> Self:  # any object with arrays of these names
        """Wrap the arrays of a loader's batch without copying them."""
        return cls(**{f.name: _wrap(getattr(batch, f.name)) for f in fields(cls)})

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on `device`; one that leaves the CPU is checked before.

        Raises:
            ValueError: as `check`.
        """
        target = torch.device(device)
        if self.cuts.is_cpu and target.type != "cpu":
            self.check()
        return type(self)(**{f.name: _move(getattr(self, f.name), target) for f in fields(self)})

    def with_spare_users(self) -> Self:
        """Return the batch with two more users, each of one behaviour and one sample, all zeros."""

        def longer(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: longer(column) for name, column in value.items()}
            return torch.cat([value, value.new_zeros(2, *value.shape[1:])])

        def one_each(offsets: Tensor) -> Tensor:
            return torch.cat([offsets, offsets[-1:] + 1, offsets[-1:] + 2])

        columns = {f.name: longer(getattr(self, f.name)) for f in fields(self)}
        offsets = ("history_offsets", "sample_offsets")
        return type(self)(**columns | {name: one_each(getattr(self, name)) for name in offsets})

    def check(self) -> None:
        """Refuse offsets and cuts that do not fit the rows.

        It reads them on the host, which on a GPU would wait for all work before: there a batch is
        checked when it is brought (`to`), and never again.

        Raises:
            ValueError: naming the one that does not.
        """
        behaviours, samples = _rows(self.behaviours), _rows(self.candidates)
        check_offsets("history_offsets", self.history_offsets, behaviours, "behaviours")
        check_offsets("sample_offsets", self.sample_offsets, samples, "samples")
        check_cuts(self.history_offsets, self.cuts, segment_of(self.sample_offsets, samples))


def _rows(columns: Mapping[str, Tensor]) -> int:
    return next((len(column) for column in columns.values()), 0)


def _wrap(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: torch.from_numpy(array) for name, array in value.items()}
    return torch.from_numpy(value)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: _move(tensor, device) for name, tensor in value.items()}
    if value.is_cpu and device.type == "cuda":
        value = value.pin_memory()  # or else the copy waits for the GPU
    return value.to(device, non_blocking=True)
