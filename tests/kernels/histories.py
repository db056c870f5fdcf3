"""Random ragged batches of whole users, for tests of operators."""

from dataclasses import dataclass, replace
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

    @property
    def keywords(self) -> dict[str, Tensor]:
        """What SDIM's operators on behaviours are given by name."""
        return {}


@dataclass(frozen=True)
class HistoriesById(Histories):
    """Histories whose behaviours are rows `ids` of `values`, a table."""

    ids: Tensor

    @classmethod
    def of_part(cls, h: Histories, dtype: torch.dtype = torch.int64, seed: int = 0) -> Self:
        """Draw behaviours from the first rows of `h`: some are met often, the last ones never."""
        n = h.values.shape[0]
        table = h.values[: 2 * n // 3 + 1]
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(max(1, len(table) - 3), (n,), generator=generator)
        ids[n // 4 : n // 2] = len(table) // 2
        return cls(**(vars(h) | {"values": table}), ids=ids.to(table.device, dtype))

    @property
    def gathered(self) -> Histories:
        """The same with the behaviours themselves."""
        arguments = {name: x for name, x in vars(self).items() if name != "ids"}
        return Histories(**(arguments | {"values": self.values.index_select(0, self.ids)}))

    @property
    def keywords(self) -> dict[str, Tensor]:
        """See Histories."""
        return {"ids": self.ids}


def with_wrong_ids(h: HistoriesById) -> HistoriesById:
    """Return ids some of which name no row of the table, by little and by far."""
    ids = h.ids.clone()
    limits = torch.iinfo(ids.dtype)
    wrong = torch.tensor([-1, len(h.values), limits.min, limits.max]).to(ids)
    ids[::3] = wrong.repeat(len(ids))[: len(ids[::3])]
    return replace(h, ids=ids)
