"""Queries at cuts: hashes, and the kernels that suit the shape."""

from torch import Tensor

from hashtab.kernels.sdim.packing import Packing
from hashtab.kernels.sdim.triton import pairs
from hashtab.kernels.sdim.triton.hashing import pack_codes

_NO_LIMIT = 2**62


def attend_at(
    values: Tensor,
    offsets: Tensor,
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    planes: Tensor,
    tau: int,
    last: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the interests `[Q, D]` and the packed codes of behaviours and of queries."""
    packing = Packing(tau, planes.shape[1] // tau)
    packed, query_packed = (pack_codes(x, planes, tau) for x in (values, queries))
    interest = pairs.attend_at(
        values.contiguous(), offsets, packed, query_packed, query_offsets, cuts, packing,
        _limit(last),
    )  # fmt: skip
    return interest, packed, query_packed


def attend_at_backward(
    grad: Tensor,
    values: Tensor,
    offsets: Tensor,
    packed: Tensor,
    query_packed: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    groups: int,
    tau: int,
    last: int | None,
) -> Tensor:
    """Return the gradient of the behaviours `[N, D]` in their dtype."""
    return pairs.attend_at_backward(
        grad.contiguous(), values.contiguous(), offsets, packed, query_packed, query_offsets,
        cuts, Packing(tau, groups), _limit(last),
    )  # fmt: skip


def _limit(last: int | None) -> int:
    return _NO_LIMIT if last is None else min(last, _NO_LIMIT)
