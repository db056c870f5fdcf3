"""Random ragged batches of whole users, for tests of operators."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hashtab.kernels.core.ragged import segment_of


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))


@dataclass(frozen=True)
class Histories:
    """Arguments of `attend_at` and of `target_attention_at`."""

    values: Tensor
    offsets: Tensor
    queries: Tensor
    query_offsets: Tensor
    cuts: Tensor
    planes: Tensor

    @classmethod
    def random(
        cls,
        lengths: list[int],
        *,
        size: int = 8,
        planes: int = 12,
        queries: int = 5,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> Self:
        """Draw users with histories of these lengths, `queries` for each, at random cuts."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        n, q = sum(lengths), queries * len(lengths)
        offsets, query_offsets = offsets_of(lengths), offsets_of([queries] * len(lengths))
        limits = offsets.diff().repeat_interleave(queries)
        share = torch.rand(q, dtype=torch.float64, generator=generator)
        cuts = (share * (limits + 1)).long().view(-1, queries).sort().values
        return cls(
            values=normal(n, size).to(dtype),
            offsets=offsets,
            queries=normal(q, size).to(dtype),
            query_offsets=query_offsets,
            cuts=cuts.flatten(),
            planes=normal(size, planes).float(),
        )

    @property
    def user(self) -> Tensor:
        """`[Q]`, the user of each query."""
        return segment_of(self.query_offsets, self.queries.shape[0])
