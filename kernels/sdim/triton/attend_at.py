"""Queries at cuts: hashes, and the algorithm that suits the codes."""

from torch import Tensor

from hashtab.kernels.sdim.packing import Packing
from hashtab.kernels.sdim.triton import pairs, walk
from hashtab.kernels.sdim.triton.hashing import pack_codes, prepare


def attend_at(
    values: Tensor,
    offsets: Tensor,
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    planes: Tensor,
    tau: int,
    last: int | None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the interests `[Q, D]` and the packed codes of behaviours and of queries."""
    packing = Packing(tau, planes.shape[1] // tau)
    values = values.contiguous()
    prepared = prepare(planes, packing, values.dtype)
    shared = prepared if queries.dtype == values.dtype else None
    packed = pack_codes(values, planes, tau, prepared, ids)
    query_packed = pack_codes(queries, planes, tau, shared)
    history = (values, offsets, packed, query_packed, query_offsets, cuts, packing)
    algorithm = walk if packing.why_no_walk(values, last) is None else pairs
    return algorithm.attend_at(*history, _limit(last), ids), packed, query_packed


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
    ids: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the behaviours `[N, D]` in their dtype."""
    packing = Packing(tau, groups)
    history = (values.contiguous(), offsets, packed, query_packed, query_offsets, cuts, packing)
    algorithm = walk if packing.why_no_walk(values, last) is None else pairs
    found: Tensor = algorithm.attend_at_backward(grad.contiguous(), *history, _limit(last), ids)
    return found


def _limit(last: int | None) -> int:
    return walk.NO_LIMIT if last is None else min(last, walk.NO_LIMIT)
