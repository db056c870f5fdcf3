"""What the workers of one training say to each other; alone, nothing is sent."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This worker among all of one training, joined by `torch.distributed` where there are more.

    Args:
        rank: of this worker.
        size: number of workers.
        device: that this worker computes on.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this is the worker that writes and speaks for all."""
        return self.rank == 0

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum of every worker's `numbers`, on this worker's device, in their place."""
        if self.size > 1:
            distributed.all_reduce(numbers)
        return numbers

    def gather(self, part: T) -> list[T]:
        """Return every worker's part, in order, on the first worker; an empty list elsewhere."""
        if self.size == 1:
            return [part]
        parts: list[Any] | None = [None] * self.size if self.first else None
        distributed.gather_object(part, parts)
        return parts or []

    def share(self, value: T) -> T:
        """Return the first worker's value on every worker."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]
