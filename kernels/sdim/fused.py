"""SDIM's fused operators, whose kernels are Triton's, for torch.library, and their gradients.

They take planes and hash themselves, in the same read of the behaviours that sums them; backward
reads the packed codes that forward leaves. With ids, behaviours are rows of a table, which kernels
gather as they read them; the behaviours' gradients are summed by row of the table behind backward.
Nothing here waits for the device: offsets, cuts and ids are read by the kernels, which keep to
their arrays whatever these hold.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hashtab.kernels.core.library import apply, implemented_in, register
from hashtab.kernels.sdim.packing import Packing

_hashtab = torch.ops.hashtab

MAX_SIZE, MAX_GROUPS, MAX_TAU = 256, 64, 10


def why_unfit(planes: Tensor, tau: int, *rows: Tensor) -> str | None:
    """Return why the kernels are not for these planes and tensors of rows, or None if they are."""
    size, groups = planes.shape[0], planes.shape[1] // tau
    if torch.float64 in {x.dtype for x in rows}:
        return "kernels are for float16, bfloat16 and float32, not float64"
    for name, value, limit in (
        ("D", size, MAX_SIZE),
        ("the number of groups", groups, MAX_GROUPS),
        ("tau", tau, MAX_TAU),
    ):
        if value > limit:
            return f"kernels are for {name} up to {limit}, got {value}"
    return None


def encode(values: Tensor, offsets: Tensor, planes: Tensor, tau: int, ids: Tensor | None) -> Tensor:
    """Return the table `[B, G, 2**tau, D]` float32."""
    return apply(_Encode, values, offsets.contiguous(), planes.detach(), tau, _contiguous(ids))


def read(table: Tensor, queries: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Return interests `[B, C, D]` float32."""
    return apply(_Read, table, queries.detach(), planes.detach(), tau)


def attend(
    values: Tensor,
    offsets: Tensor,
    queries: Tensor,
    planes: Tensor,
    tau: int,
    ids: Tensor | None,
) -> Tensor:
    """Return interests `[B, C, D]` in the dtype of the values.

    Sums of the buckets of candidates or of all buckets, whichever are fewer.
    """
    if through_a_table(queries.shape[1], tau):
        table = encode(values, offsets, planes, tau, ids)
        return read(table, queries, planes, tau).to(values.dtype)
    keep = torch.is_grad_enabled() and values.requires_grad
    asked = (queries.detach(), planes.detach(), tau, keep, _contiguous(ids))
    return apply(_Attend, values, offsets.contiguous(), *asked)


def attend_at(
    values: Tensor,
    offsets: Tensor,
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    planes: Tensor,
    tau: int,
    last: int | None,
    ids: Tensor | None,
) -> Tensor:
    """Return interests `[Q, D]` in the dtype of the values."""
    offsets, query_offsets, cuts = (x.contiguous() for x in (offsets, query_offsets, cuts))
    at = (query_offsets, cuts, planes.detach(), tau, last, _contiguous(ids))
    return apply(_AttendAt, values, offsets, queries.detach(), *at)


def _contiguous(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.contiguous()


def through_a_table(candidates: int, tau: int) -> bool:
    """Return whether so many candidates of a user are read from a table of all buckets."""
    return candidates > 1 << tau


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, offsets: Tensor, planes: Tensor, tau: int, ids: Tensor | None
    ) -> Tensor:
        table, packed = _hashtab.sdim_fused_encode(values, offsets, planes, tau, ids)
        ctx.save_for_backward(offsets, packed, ids)
        ctx.dtype, ctx.items = values.dtype, values.shape[0]
        result: Tensor = table
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *kept, ids = ctx.saved_tensors
        grad = _hashtab.sdim_fused_encode_backward(grads[0], *kept, ctx.dtype)
        return _grad_of_values(grad, ids, ctx.items), None, None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, queries: Tensor, planes: Tensor, tau: int) -> Tensor:
        interest, packed = _hashtab.sdim_fused_read(table, queries, planes, tau)
        ctx.save_for_backward(table, packed)
        result: Tensor = interest
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _hashtab.sdim_fused_read_backward(grads[0], *ctx.saved_tensors), None, None, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor, *arguments: Any) -> Tensor:
        _, planes, tau, _, ids = arguments
        interest, *kept = _hashtab.sdim_fused_attend(values, offsets, *arguments)
        ctx.save_for_backward(offsets, *kept, ids)
        ctx.code, ctx.items = (planes.shape[1] // tau, tau), values.shape[0]
        result: Tensor = interest
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *kept, ids = ctx.saved_tensors
        grad = _hashtab.sdim_fused_attend_backward(grads[0], *kept, *ctx.code)
        return _grad_of_values(grad, ids, ctx.items), *[None] * 6


class _AttendAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor, *arguments: Any) -> Tensor:
        _, query_offsets, cuts, planes, tau, last, ids = arguments
        interest, *kept = _hashtab.sdim_fused_attend_at(values, offsets, *arguments)
        ctx.save_for_backward(values, offsets, *kept, query_offsets, cuts, ids)
        ctx.settings = (planes.shape[1] // tau, tau, last)
        result: Tensor = interest
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *kept, ids = ctx.saved_tensors
        grad = _hashtab.sdim_fused_attend_at_backward(grads[0], *kept, *ctx.settings, ids)
        return _grad_of_values(grad, ids, kept[0].shape[0]), *[None] * 8


def _grad_of_values(grad: Tensor, ids: Tensor | None, items: int) -> Tensor:
    """Return the gradient of `values` `[V, D]` from that of the behaviours `[N, D]`."""
    if ids is None:
        return grad
    result: Tensor = _hashtab.sdim_fused_sum_by_item(grad, ids, items)
    return result


def _encode_fake(
    values: Tensor, offsets: Tensor, planes: Tensor, tau: int, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    packing = Packing(tau, planes.shape[1] // tau)
    shape = (offsets.shape[0] - 1, packing.groups, 2**tau, values.shape[1])
    packed = _packed(values, _behaviours(values, ids), packing)
    return values.new_empty(shape, dtype=torch.float32), packed


def _behaviours(values: Tensor, ids: Tensor | None) -> int:
    return (values if ids is None else ids).shape[0]


def _packed(like: Tensor, rows: int, packing: Packing) -> Tensor:
    return like.new_empty(rows, packing.words, dtype=torch.int32)


def _encode_backward_fake(
    grad_table: Tensor, _offsets: Tensor, packed: Tensor, dtype: torch.dtype
) -> Tensor:
    return grad_table.new_empty(packed.shape[0], grad_table.shape[3], dtype=dtype)


def _read_fake(table: Tensor, queries: Tensor, planes: Tensor, tau: int) -> tuple[Tensor, Tensor]:
    rows = queries.shape[0] * queries.shape[1]
    packing = Packing(tau, planes.shape[1] // tau)
    return table.new_empty(queries.shape), _packed(table, rows, packing)


def _read_backward_fake(_grad: Tensor, table: Tensor, _packed: Tensor) -> Tensor:
    return table.new_empty(table.shape)


def _attend_fake(
    values: Tensor,
    _offsets: Tensor,
    queries: Tensor,
    planes: Tensor,
    tau: int,
    keep: bool,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packing = Packing(tau, planes.shape[1] // tau)
    users, candidates, size = queries.shape
    kept = users if keep else 0
    return (
        values.new_empty(queries.shape),
        _packed(values, _behaviours(values, ids) if keep else 0, packing),
        _packed(values, users * candidates, packing),
        values.new_empty(kept, candidates, packing.padded_groups, size, dtype=torch.float32),
    )


def _attend_backward_fake(grad: Tensor, _offsets: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return grad.new_empty(packed.shape[0], grad.shape[2])


def _attend_at_fake(
    values: Tensor,
    _offsets: Tensor,
    queries: Tensor,
    _query_offsets: Tensor,
    _cuts: Tensor,
    planes: Tensor,
    tau: int,
    _last: int | None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    packing = Packing(tau, planes.shape[1] // tau)
    return (
        values.new_empty(queries.shape),
        _packed(values, _behaviours(values, ids), packing),
        _packed(values, queries.shape[0], packing),
    )


def _attend_at_backward_fake(
    _grad: Tensor, values: Tensor, _offsets: Tensor, packed: Tensor, *_: Any
) -> Tensor:
    return values.new_empty(packed.shape[0], values.shape[1])


def _sum_by_item_fake(grads: Tensor, _ids: Tensor, items: int) -> Tensor:
    return grads.new_empty(items, grads.shape[1])


_TRITON = "hashtab.kernels.sdim.triton"
_HISTORY = "Tensor values, Tensor offsets"
_CODES = "Tensor planes, int tau"
_IDS = "Tensor? ids=None"

register(
    "sdim_fused_encode",
    f"({_HISTORY}, {_CODES}, {_IDS}) -> (Tensor, Tensor)",
    implemented_in(f"{_TRITON}.encode", "encode"),
    _encode_fake,
)
register(
    "sdim_fused_encode_backward",
    "(Tensor grad_table, Tensor offsets, Tensor packed, ScalarType dtype) -> Tensor",
    implemented_in(f"{_TRITON}.encode", "encode_backward"),
    _encode_backward_fake,
)
register(
    "sdim_fused_read",
    f"(Tensor table, Tensor queries, {_CODES}) -> (Tensor, Tensor)",
    implemented_in(f"{_TRITON}.read", "read"),
    _read_fake,
)
register(
    "sdim_fused_read_backward",
    "(Tensor grad, Tensor table, Tensor packed) -> Tensor",
    implemented_in(f"{_TRITON}.read", "read_backward"),
    _read_backward_fake,
)
register(
    "sdim_fused_attend",
    f"({_HISTORY}, Tensor queries, {_CODES}, bool keep, {_IDS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    implemented_in(f"{_TRITON}.attend", "attend"),
    _attend_fake,
)
register(
    "sdim_fused_attend_backward",
    "(Tensor grad, Tensor offsets, Tensor packed, Tensor query_packed, Tensor sums, "
    "int groups, int tau) -> Tensor",
    implemented_in(f"{_TRITON}.attend", "attend_backward"),
    _attend_backward_fake,
)
register(
    "sdim_fused_attend_at",
    f"({_HISTORY}, Tensor queries, Tensor query_offsets, Tensor cuts, {_CODES}, int? last, {_IDS}) "
    "-> (Tensor, Tensor, Tensor)",
    implemented_in(f"{_TRITON}.attend_at", "attend_at"),
    _attend_at_fake,
)
register(
    "sdim_fused_attend_at_backward",
    f"(Tensor grad, {_HISTORY}, Tensor packed, Tensor query_packed, "
    f"Tensor query_offsets, Tensor cuts, int groups, int tau, int? last, {_IDS}) -> Tensor",
    implemented_in(f"{_TRITON}.attend_at", "attend_at_backward"),
    _attend_at_backward_fake,
)
register(
    "sdim_fused_sum_by_item",
    "(Tensor grads, Tensor ids, SymInt items) -> Tensor",
    implemented_in(f"{_TRITON}.items", "sum_by_item"),
    _sum_by_item_fake,
)
