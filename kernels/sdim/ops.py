"""SDIM's operators for torch.library: data checks, choice of implementation, fake results.

An operator checks what only its data can tell (offsets, cuts, ids); shapes and dtypes are checked
before, in `api.py`, where tracing sees them.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hashtab.kernels.core import checks
from hashtab.kernels.core.dispatch import use_native
from hashtab.kernels.core.library import register
from hashtab.kernels.core.precision import sums_dtype
from hashtab.kernels.core.ragged import segment_of
from hashtab.kernels.sdim import native, reference


def _implementation(impl: str, tensor: Tensor) -> ModuleType:
    return native if use_native(impl, tensor.device, native.SOURCE) else reference


def _hash(impl: str, x: Tensor) -> Callable[[Tensor, Tensor, int], Tensor]:
    if impl != "triton":
        codes: Callable[[Tensor, Tensor, int], Tensor] = _implementation(impl, x).codes
        return codes
    from hashtab.kernels.sdim.triton.hashing import codes as triton_codes

    return triton_codes


def _codes(x: Tensor, planes: Tensor, tau: int, impl: str) -> Tensor:
    rows: Tensor = _hash(impl, x)(x.reshape(-1, x.shape[-1]), planes, tau)
    return rows.view(*x.shape[:-1], rows.shape[1])


def _codes_fake(x: Tensor, planes: Tensor, tau: int, _impl: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], planes.shape[1] // tau), dtype=torch.int32)


def _checked_ids(ids: Tensor, items: int) -> Tensor:
    checks.check_items(ids, items)
    return ids.clone()


def _checked_ids_fake(ids: Tensor, _items: int) -> Tensor:
    return torch.empty_like(ids)


def _encode(values: Tensor, offsets: Tensor, codes: Tensor, tau: int, impl: str) -> Tensor:
    checks.check_offsets("offsets", offsets, values.shape[0], "behaviours")
    checks.check_codes("codes", codes, (values.shape[0], codes.shape[-1]), 2**tau)
    table: Tensor = _implementation(impl, values).encode(values, offsets, codes, tau)
    return table


def _encode_fake(values: Tensor, offsets: Tensor, codes: Tensor, tau: int, _impl: str) -> Tensor:
    shape = (offsets.shape[0] - 1, codes.shape[1], 2**tau, values.shape[1])
    return values.new_empty(shape, dtype=sums_dtype(values.dtype))


def _encode_backward(grad_table: Tensor, offsets: Tensor, codes: Tensor, impl: str) -> Tensor:
    groups, buckets = grad_table.shape[1:3]
    checks.check_offsets("offsets", offsets, codes.shape[0], "behaviours")
    checks.check_codes("codes", codes, (codes.shape[0], groups), buckets)
    implementation = _implementation(impl, grad_table)
    grad: Tensor = implementation.encode_backward(grad_table, offsets, codes)
    return grad


def _encode_backward_fake(grad_table: Tensor, _offsets: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return grad_table.new_empty(codes.shape[0], grad_table.shape[3])


def _read(table: Tensor, codes: Tensor, impl: str) -> Tensor:
    _check_read(table, codes)
    interest: Tensor = _implementation(impl, table).read(table, codes)
    return interest


def _check_read(table: Tensor, codes: Tensor) -> None:
    users, groups, buckets, _ = table.shape
    checks.check_codes("codes", codes, (users, codes.shape[1], groups), buckets)


def _read_fake(table: Tensor, codes: Tensor, _impl: str) -> Tensor:
    return table.new_empty(codes.shape[0], codes.shape[1], table.shape[3])


def _read_backward(grad: Tensor, table: Tensor, codes: Tensor, impl: str) -> Tensor:
    _check_read(table, codes)
    shape = (*codes.shape[:2], table.shape[3])
    if grad.shape != shape:
        raise ValueError(f"grad must be of shape {shape}, got {tuple(grad.shape)}")
    grad_table: Tensor = _implementation(impl, table).read_backward(grad, table, codes)
    return grad_table


def _read_backward_fake(_grad: Tensor, table: Tensor, *_: Any) -> Tensor:
    return table.new_empty(table.shape)


def _attend_at(
    values: Tensor,
    offsets: Tensor,
    codes: Tensor,
    query_codes: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    tau: int,
    last: int | None,
    impl: str,
) -> Tensor:
    _check_walk(values, offsets, codes, query_codes, query_offsets, cuts, tau)
    interest: Tensor = _implementation(impl, values).attend_at(
        values, offsets, codes, query_codes, query_offsets, cuts, tau, last
    )
    return interest


def _check_walk(
    values: Tensor,
    offsets: Tensor,
    codes: Tensor,
    query_codes: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    tau: int,
) -> None:
    groups = codes.shape[-1]
    checks.check_offsets("offsets", offsets, values.shape[0], "behaviours")
    checks.check_offsets("query_offsets", query_offsets, cuts.shape[0], "queries")
    checks.check_codes("codes", codes, (values.shape[0], groups), 2**tau)
    checks.check_codes("query_codes", query_codes, (cuts.shape[0], groups), 2**tau)
    checks.check_cuts(offsets, cuts, segment_of(query_offsets, cuts.shape[0]))


def _attend_at_fake(
    values: Tensor,
    _offsets: Tensor,
    _codes: Tensor,
    _query_codes: Tensor,
    _query_offsets: Tensor,
    cuts: Tensor,
    *_: Any,
) -> Tensor:
    return values.new_empty(cuts.shape[0], values.shape[1], dtype=sums_dtype(values.dtype))


def _attend_at_backward(
    grad: Tensor,
    values: Tensor,
    offsets: Tensor,
    codes: Tensor,
    query_codes: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    tau: int,
    last: int | None,
    impl: str,
) -> Tensor:
    _check_walk(values, offsets, codes, query_codes, query_offsets, cuts, tau)
    grad_values: Tensor = _implementation(impl, values).attend_at_backward(
        grad, values, offsets, codes, query_codes, query_offsets, cuts, tau, last
    )
    return grad_values


def _attend_at_backward_fake(_grad: Tensor, values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(values.shape, dtype=sums_dtype(values.dtype))


_HISTORY = "Tensor values, Tensor offsets, Tensor codes"
_QUERIES = "Tensor query_codes, Tensor query_offsets, Tensor cuts, int tau, int? last, str impl"

register(
    "sdim_codes", "(Tensor x, Tensor planes, int tau, str impl) -> Tensor", _codes, _codes_fake
)
register(
    "sdim_checked_ids", "(Tensor ids, SymInt items) -> Tensor", _checked_ids, _checked_ids_fake
)
register("sdim_encode", f"({_HISTORY}, int tau, str impl) -> Tensor", _encode, _encode_fake)
register(
    "sdim_encode_backward",
    "(Tensor grad_table, Tensor offsets, Tensor codes, str impl) -> Tensor",
    _encode_backward,
    _encode_backward_fake,
)
register("sdim_read", "(Tensor table, Tensor codes, str impl) -> Tensor", _read, _read_fake)
register(
    "sdim_read_backward",
    "(Tensor grad, Tensor table, Tensor codes, str impl) -> Tensor",
    _read_backward,
    _read_backward_fake,
)
register("sdim_attend_at", f"({_HISTORY}, {_QUERIES}) -> Tensor", _attend_at, _attend_at_fake)
register(
    "sdim_attend_at_backward",
    f"(Tensor grad, {_HISTORY}, {_QUERIES}) -> Tensor",
    _attend_at_backward,
    _attend_at_backward_fake,
)
