"""Exact softmax attention over long histories and in sliding windows, the public functions.

All functions take `impl`: `"blocked"` (matrix products of blocks of queries, flat memory),
`"reference"` (the definition over all pairs), for target attention `"triton"` (fused GPU kernels),
or `"auto"`, which is `"triton"` where that can run on a GPU, else `"blocked"`. They give the same
result up to rounding. Queries, keys and values may be float16, bfloat16, float32 or float64, each
its own but for `"triton"`, which takes one of the first three for all; scores and sums are float32
(float64 for float64 values), also under autocast.

`"triton"` never waits for the GPU, so it can be captured in a CUDA graph; what only the content of
offsets and cuts could tell is then not checked, and with wrong ones the result means nothing.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hashtab.kernels.core import checks
from hashtab.kernels.core.dispatch import check_impl, use_triton
from hashtab.kernels.core.library import apply
from hashtab.kernels.core.precision import sums_dtype
from hashtab.kernels.core.ragged import segment_of
from hashtab.kernels.dense import ops as _ops  # noqa: F401  registers torch.ops.hashtab.dense_*
from hashtab.kernels.dense import reference

Impl = Literal["auto", "reference", "blocked"]
TargetImpl = Literal["auto", "reference", "blocked", "triton"]

_WIDEST = 256  # columns that Triton's tiles may have

_hashtab = torch.ops.hashtab


def target_attention(
    queries: Tensor,
    values: Tensor,
    offsets: Tensor,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
    impl: TargetImpl = "auto",
) -> Tensor:
    """Return softmax(scale q K^T) V of each candidate over its user's whole history.

    Args:
        queries: `[B, C, D]`, candidates of each user.
        values: `[N, Dv]`, the behaviours of all users, user after user.
        offsets: `[B + 1]` int64, first 0, last N.
        keys: `[N, D]`; the values when None.
        scale: factor of the scores, at least 0; 1 / sqrt(D) when None.
        impl: which implementation; see the module.

    Returns:
        `[B, C, Dv]` in the dtype of `values`; zeros, with zero gradient, for an empty history.

    Raises:
        TypeError: a dtype or the kind of a number is wrong.
        ValueError: shapes, offsets or scale are wrong.
        RuntimeError: `"triton"` was asked for and cannot run, with the reason.
    """
    check_impl(impl, get_args(TargetImpl))
    checks.check_rows("queries", queries, "[B, C, D]")
    checks.check_bounds("offsets", offsets)
    checks.check_users("queries", queries.shape[0], offsets)
    candidates, rows = queries.shape[1], queries.flatten(0, 1)
    key_rows = values if keys is None else keys
    _check_rows(rows, key_rows, values, offsets)
    _check_scale(scale)
    if _use_triton(impl, rows, key_rows, values, scale):
        checks.check_same_device(queries=queries, keys=key_rows, values=values, offsets=offsets)
        interest = _fused(rows, None, None, values, offsets, keys=keys, scale=scale, last=None)
    else:
        query_offsets = torch.arange(offsets.shape[0], device=offsets.device) * candidates
        cuts = offsets.diff()[:, None].expand(-1, candidates).flatten()
        places = (query_offsets, cuts, values, offsets)
        interest = target_attention_at(rows, *places, keys=keys, scale=scale, impl=impl)
    return interest.view(*queries.shape[:2], values.shape[1])


def target_attention_at(
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    values: Tensor,
    offsets: Tensor,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
    last: int | None = None,
    impl: TargetImpl = "auto",
) -> Tensor:
    """Return softmax target attention of each query over the behaviours before its cut.

    Args:
        queries: `[Q, D]`, candidates; those of user u are rows query_offsets[u] up to
            query_offsets[u + 1].
        query_offsets: `[B + 1]` int64, first 0, last Q.
        cuts: `[Q]` int64, ascending within a user: query i sees the first cuts[i] behaviours.
        values: `[N, Dv]`, behaviours in time order within a user.
        offsets: `[B + 1]` int64, first 0, last N.
        keys: `[N, D]`; the values when None.
        scale: factor of the scores, at least 0; 1 / sqrt(D) when None.
        last: of the behaviours before the cut the latest `last` only; None for all.
        impl: which implementation; see the module.

    Returns:
        `[Q, Dv]` in the dtype of `values`; zeros, with zero gradient, where a query sees nothing.

    Raises:
        TypeError: a dtype or the kind of a number is wrong.
        ValueError: shapes, offsets, cuts, scale or last are wrong.
        RuntimeError: `"triton"` was asked for and cannot run, with the reason.
    """
    check_impl(impl, get_args(TargetImpl))
    key_rows = values if keys is None else keys
    _check_rows(queries, key_rows, values, offsets)
    _check_scale(scale)
    checks.check_queries(queries, query_offsets, cuts, offsets, queries.shape[1], last)
    checks.check_same_device(
        queries=queries,
        query_offsets=query_offsets,
        cuts=cuts,
        keys=key_rows,
        values=values,
        offsets=offsets,
    )
    if _use_triton(impl, queries, key_rows, values, scale):
        places = (query_offsets, cuts, values, offsets)
        return _fused(queries, *places, keys=keys, scale=scale, last=last)
    factor = _scale(queries, scale)
    arguments = (queries, query_offsets, cuts, key_rows, values, offsets, factor, last)
    if impl == "reference":
        return _reference(*arguments)
    return apply(_AttendAt, *arguments).to(values.dtype)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool,
    lengths: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return softmax attention of each position over those less than `window` away.

    Args:
        q: `[B, T, H, D]`, queries.
        k: `[B, T, H, D]`, keys.
        v: `[B, T, H, Dv]`, values.
        window: positions that a query sees at most on each side, its own included: with
            `causal` t - window + 1 .. t, else t - window + 1 .. t + window - 1.
        causal: whether later positions are hidden.
        lengths: `[B]` int64, positions of each sequence that are no padding; None for all.
        scale: factor of the scores; 1 / sqrt(D) when None.
        impl: which implementation; see the module.

    Returns:
        `[B, T, H, Dv]` in the dtype of `v`; zeros, with zero gradient, at padding.

    Raises:
        TypeError: a dtype or the kind of a number is wrong.
        ValueError: shapes, lengths or window are wrong.
    """
    check_impl(impl, get_args(Impl))
    _check_window(q, k, v, window, lengths)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if impl == "reference":
        checks.check_lengths(lengths, q.shape[1])
        real = sums_dtype(v.dtype)
        with torch.autocast(v.device.type, enabled=False):
            out = reference.window_attention(
                q.to(real), k.to(real), v.to(real), window, causal, lengths, scale
            )
        return out.to(v.dtype)
    return apply(_Window, q, k, v, window, causal, lengths, scale).to(v.dtype)


def _check_window(q: Tensor, k: Tensor, v: Tensor, window: int, lengths: Tensor | None) -> None:
    checks.check_rows("q", q, "[B, T, H, D]")
    checks.check_rows("k", k, "[B, T, H, D]", q.shape[3])
    checks.check_rows("v", v, "[B, T, H, Dv]")
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            "q, k and v must agree in B, T and H, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[3] == 0:
        raise ValueError(f"q must be [B, T, H, D] with D of at least 1, got {tuple(q.shape)}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window=}")
    checks.check_same_device(q=q, k=k, v=v)
    if lengths is not None:
        checks.check_index("lengths", lengths)
        checks.check_same_device(q=q, lengths=lengths)
        if lengths.shape != q.shape[:1]:
            raise ValueError(
                f"lengths must be [B] for B = {q.shape[0]}, got {tuple(lengths.shape)}"
            )


def _reference(
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    scale: float,
    last: int | None,
) -> Tensor:
    checks.check_offsets("offsets", offsets, values.shape[0], "behaviours")
    checks.check_offsets("query_offsets", query_offsets, cuts.shape[0], "queries")
    checks.check_cuts(offsets, cuts, segment_of(query_offsets, cuts.shape[0]))
    real = sums_dtype(values.dtype)
    queries, keys, rows = queries.to(real), keys.to(real), values.to(real)
    with torch.autocast(values.device.type, enabled=False):
        interest = reference.target_attention_at(
            queries, query_offsets, cuts, keys, rows, offsets, scale, last
        )
    return interest.to(values.dtype)


def _scale(queries: Tensor, scale: float | None) -> float:
    return queries.shape[1] ** -0.5 if scale is None else scale


def _check_scale(scale: float | None) -> None:
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"scale must be at least 0 and finite, got {scale=}")


def _use_triton(
    impl: TargetImpl, queries: Tensor, keys: Tensor, values: Tensor, scale: float | None
) -> bool:
    """Decide whether Triton's kernels run, which are not for all arguments."""
    dtypes = {rows.dtype for rows in (queries, keys, values)}
    widths = queries.shape[1], values.shape[1]
    unfit = None
    if len(dtypes) > 1 or values.dtype == torch.float64:
        unfit = f"rows must be all float16, all bfloat16 or all float32, got {dtypes}"
    elif not all(1 <= width <= _WIDEST for width in widths):
        unfit = f"D and Dv must lie within 1 .. {_WIDEST}, got {widths}"
    elif scale is not None and scale < torch.finfo(torch.float32).tiny:
        unfit = "scale must be above 0 in float32"
    return use_triton(impl, values.device, unfit)


def _fused(
    queries: Tensor,
    query_offsets: Tensor | None,
    cuts: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    *,
    keys: Tensor | None,
    scale: float | None,
    last: int | None,
) -> Tensor:
    keys = None if keys is values else keys
    places = (query_offsets, cuts, keys, values, offsets)
    return apply(_FusedAttendAt, queries, *places, _scale(queries, scale), last)


def _check_rows(queries: Tensor, keys: Tensor, values: Tensor, offsets: Tensor) -> None:
    checks.check_rows("queries", queries, "[Q, D]")
    if queries.shape[1] == 0:
        raise ValueError(f"queries must be [Q, D] with D of at least 1, got {tuple(queries.shape)}")
    checks.check_rows("values", values, "[N, Dv]")
    checks.check_rows("keys", keys, "[N, D]", queries.shape[1])
    checks.check_bounds("offsets", offsets)
    if keys.shape[0] != values.shape[0]:
        raise ValueError(
            f"keys and values must have one row for each behaviour, "
            f"got {keys.shape[0]} and {values.shape[0]}"
        )


class _AttendAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, scale, last = arguments
        interest, log_sums = _hashtab.dense_attend_at(*tensors, scale, last)
        ctx.save_for_backward(interest, log_sums, *tensors)
        ctx.settings = (scale, last)
        result: Tensor = interest
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, _, queries, _, _, keys, values, _ = ctx.saved_tensors
        grad_queries, grad_keys, grad_values = _hashtab.dense_attend_at_backward(
            grads[0], *ctx.saved_tensors, *ctx.settings
        )
        return (
            grad_queries.to(queries.dtype),
            None,
            None,
            grad_keys.to(keys.dtype),
            grad_values.to(values.dtype),
            None,
            None,
            None,
        )


class _FusedAttendAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, scale, last = arguments
        interest, log_sums = _hashtab.dense_fused_attend_at(*tensors, scale, last)
        ctx.save_for_backward(interest, log_sums, *tensors)
        ctx.settings = (scale, last)
        result: Tensor = interest
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_queries, grad_keys, grad_values = _hashtab.dense_fused_attend_at_backward(
            grads[0], *ctx.saved_tensors, *ctx.settings
        )
        keys = ctx.saved_tensors[5]
        grad_keys = None if keys is None else grad_keys
        return grad_queries, None, None, grad_keys, grad_values, None, None, None


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        q, k, v, window, causal, lengths, scale = arguments
        out, log_sums = _hashtab.dense_window(*arguments)
        ctx.save_for_backward(out, log_sums, q, k, v, lengths)
        ctx.settings = (window, causal, scale)
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, log_sums, q, k, v, lengths = ctx.saved_tensors
        window, causal, scale = ctx.settings
        grad_q, grad_k, grad_v = _hashtab.dense_window_backward(
            grads[0], out, log_sums, q, k, v, window, causal, lengths, scale
        )
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None
