"""SDIM: hash-sampled attention over the whole history (arXiv 2205.10249)."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding

from hashtab.kernels import sdim
from hashtab.kernels.sdim.api import Impl
from hashtab.models.ctr.encoders.base import EmbeddedUsers, HistoryEncoder, ServedUsers


class HashSampledAttention(HistoryEncoder):
    """Read the buckets of the user's behaviours that the candidate falls into.

    Training on a GPU hashes embeddings rounded to bfloat16, as autocast hands them on, by products
    accumulated in float32; evaluation and serving hash the float32 embeddings themselves. A code
    differs between them where rounding carries a vector over a plane: 0.3% of the behaviours' codes
    of a model trained on Complete Journey, whose validation gAUC is .8032, rounded .8031. Models
    are therefore measured as they are served: in float32, never under autocast.

    Args:
        size: length D of a behaviour's vector.
        planes: number M of hash planes.
        tau: bits of a group's code; must divide `planes`.
        last: behaviours that a sample sees, the latest; all of them when None.

    Attributes:
        planes: `[D, M]` float32, drawn once from N(0, 1) and rounded to bfloat16's digits, with
            which a GPU hashes bfloat16 embeddings in a third of the products; a buffer, so the
            state dict carries it and training, evaluation and serving hash with the same ones. It
            stays float32 in a model that is cast to another dtype.
        impl: implementation of the kernel, as `hashtab.kernels.sdim` names them.
    """

    planes: Tensor
    impl: Impl = "auto"

    def __init__(self, size: int, planes: int, tau: int, last: int | None = None) -> None:
        super().__init__()
        self.output_size = size
        self.tau = tau
        self.last = last
        self.groups, self.buckets = planes // tau, 2**tau
        self.looks_up = True
        drawn = torch.randn(size, planes, dtype=torch.float32)
        self.register_buffer("planes", drawn.bfloat16().float())
        self._rounded = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        planes = self.planes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.planes.dtype != planes.dtype:
            self.planes = planes.to(self.planes.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any
    ) -> None:
        """Load planes, and see whether they are bfloat16's."""
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._rounded = torch.equal(self.planes.bfloat16().float(), self.planes)

    def forward(self, users: EmbeddedUsers) -> Tensor:
        """Return `[Q, D]`."""
        return sdim.attend_at(
            users.behaviours,
            users.history_offsets,
            users.candidates,
            users.sample_offsets,
            users.cuts,
            self._planes_for(users.behaviours),
            self.tau,
            last=self.last,
            impl=self.impl,
        )

    def _planes_for(self, rows: Tensor) -> Tensor:
        """Return the planes in the dtype of rows that have the same codes with them."""
        return (
            self.planes.bfloat16()
            if self._rounded and rows.dtype == torch.bfloat16
            else self.planes
        )

    def serve(self, users: ServedUsers) -> Tensor:
        """Return `[U, C, D]`: the kernel's `read` in operations that every runtime has.

        Each row of a table is normalised once, whatever the number of candidates; the unit of the
        table falls out.
        """
        n_users, n_candidates, size = users.candidates.shape
        norm = torch.linalg.vector_norm(users.table, dim=-1, keepdim=True)
        unit = (users.table / norm.clamp(min=torch.finfo(norm.dtype).tiny)).reshape(-1, size)
        first_U = torch.arange(n_users, dtype=users.buckets.dtype, device=unit.device)
        wanted_UCG = users.buckets + (first_U * (self.groups * self.buckets))[:, None, None]
        # Not index_select, which a graph takes 64 bit indices for.
        read = embedding(wanted_UCG.permute(2, 0, 1).flatten(), unit)
        # The mean over groups as one product: runtimes sum short runs three times slower.
        weights = read.new_full((1, self.groups), 1 / self.groups)
        mean: Tensor = weights @ read.view(self.groups, n_users * n_candidates * size)
        return mean.view(n_users, n_candidates, size)

    def codes(self, vectors: Tensor) -> Tensor:
        """Return `[..., G]`; as `kernels.sdim.codes`, by products that every runtime has."""
        bits = (vectors.float() @ self.planes > 0).float()
        codes: Tensor = (bits @ self._powers()).long()
        return codes

    def _powers(self) -> Tensor:
        """`[M, G]`: a plane's power of two in its own group, 0 elsewhere."""
        powers = 2.0 ** torch.arange(self.tau, device=self.planes.device)
        matrix: Tensor = torch.block_diag(*[powers[:, None]] * self.groups)
        return matrix
