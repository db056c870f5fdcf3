"""Calls into `native.c`: same functions and arguments as `reference.py`, CPU tensors only."""

from pathlib import Path

import torch
from torch import Tensor

from hashtab.kernels.core import native
from hashtab.kernels.core.precision import sums_dtype

SOURCE = Path(__file__).with_name("native.c")
_NO_LIMIT = 2**62


def codes(x: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Return the bucket of each row in each group, `[N, G]` int32."""
    rows, size = x.shape
    groups = planes.shape[1] // tau
    out = torch.empty(rows, groups, dtype=torch.int32)
    _call("sdim_codes", [x.float(), planes.float(), out], rows, size, groups, tau)
    return out


def encode(values: Tensor, offsets: Tensor, codes: Tensor, tau: int) -> Tensor:
    """Return the table `[B, G, 2**tau, D]`."""
    real = sums_dtype(values.dtype)
    users, groups, size = offsets.shape[0] - 1, codes.shape[1], values.shape[1]
    out = torch.empty(users, groups, 2**tau, size, dtype=real)
    tensors = [values.to(real), offsets, codes, out]
    _call(f"sdim_encode_{native.SUFFIX[real]}", tensors, users, groups, 2**tau, size)
    return out


def encode_backward(grad_table: Tensor, offsets: Tensor, codes: Tensor) -> Tensor:
    """Return the gradient of the behaviours `[N, D]`."""
    users, groups, buckets, size = grad_table.shape
    out = grad_table.new_empty(codes.shape[0], size)
    tensors = [grad_table, offsets, codes, out]
    suffix = native.SUFFIX[grad_table.dtype]
    _call(f"sdim_encode_backward_{suffix}", tensors, users, groups, buckets, size)
    return out


def read(table: Tensor, codes: Tensor) -> Tensor:
    """Return the interest `[B, C, D]`."""
    users, groups, buckets, size = table.shape
    out = table.new_empty(users, codes.shape[1], size)
    shape = (users, codes.shape[1], groups, buckets, size)
    _call(f"sdim_read_{native.SUFFIX[table.dtype]}", [table, codes, out], *shape)
    return out


def read_backward(grad: Tensor, table: Tensor, codes: Tensor) -> Tensor:
    """Return the gradient of the table `[B, G, 2**tau, D]`."""
    users, groups, buckets, size = table.shape
    out = table.new_empty(table.shape)
    tensors = [grad, table, codes, out]
    shape = (users, codes.shape[1], groups, buckets, size)
    _call(f"sdim_read_backward_{native.SUFFIX[table.dtype]}", tensors, *shape)
    return out


def attend_at(
    values: Tensor,
    offsets: Tensor,
    codes: Tensor,
    query_codes: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    tau: int,
    last: int | None,
) -> Tensor:
    """Return the interest `[Q, D]`: one walk over each history serves all of its queries."""
    real = sums_dtype(values.dtype)
    out = torch.empty(cuts.shape[0], values.shape[1], dtype=real)
    tensors = [values.to(real), offsets, codes, query_codes, query_offsets, cuts, out]
    shape = (offsets.shape[0] - 1, codes.shape[1], 2**tau, values.shape[1])
    _call(f"sdim_attend_at_{native.SUFFIX[real]}", tensors, *shape, _limit(last))
    return out


def attend_at_backward(
    grad: Tensor,
    values: Tensor,
    offsets: Tensor,
    codes: Tensor,
    query_codes: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    tau: int,
    last: int | None,
) -> Tensor:
    """Return the gradient of the behaviours `[N, D]`: the same walk in reverse."""
    real = sums_dtype(values.dtype)
    out = torch.empty(values.shape, dtype=real)
    tensors = [grad.to(real), values.to(real), offsets, codes]
    tensors += [query_codes, query_offsets, cuts, out]
    shape = (offsets.shape[0] - 1, codes.shape[1], 2**tau, values.shape[1])
    _call(f"sdim_attend_at_backward_{native.SUFFIX[real]}", tensors, *shape, _limit(last))
    return out


def _limit(last: int | None) -> int:
    return _NO_LIMIT if last is None else min(last, _NO_LIMIT)


def _call(function: str, tensors: list[Tensor], *sizes: int) -> None:
    """Call C with the tensors, the sizes and the number of threads; the last tensor is written."""
    native.call(SOURCE, function, tensors, sizes)
