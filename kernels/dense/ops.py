"""Operators of exact target attention for torch.library."""

from typing import Any

import torch
from torch import Tensor

from hashtab.kernels.core import checks
from hashtab.kernels.core.library import implemented_in, register
from hashtab.kernels.core.precision import sums_dtype
from hashtab.kernels.core.ragged import segment_of
from hashtab.kernels.dense import blocked, windowed
from hashtab.kernels.dense.windowed import Window


def _attend_at(
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    scale: float,
    last: int | None,
) -> tuple[Tensor, Tensor]:
    checks.check_offsets("offsets", offsets, values.shape[0], "behaviours")
    checks.check_offsets("query_offsets", query_offsets, cuts.shape[0], "queries")
    checks.check_cuts(offsets, cuts, segment_of(query_offsets, cuts.shape[0]))
    real = sums_dtype(values.dtype)
    with torch.autocast(values.device.type, enabled=False):
        return blocked.attend_at(
            queries.to(real),
            query_offsets,
            cuts,
            keys.to(real),
            values.to(real),
            offsets,
            scale,
            last,
        )


def _attend_at_fake(
    _queries: Tensor, _query_offsets: Tensor, cuts: Tensor, _keys: Tensor, values: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    real = sums_dtype(values.dtype)
    interest = values.new_empty(cuts.shape[0], values.shape[1], dtype=real)
    return interest, values.new_empty(cuts.shape[0], dtype=real)


def _attend_at_backward(
    grad: Tensor,
    interest: Tensor,
    log_sums: Tensor,
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    scale: float,
    last: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    real = sums_dtype(values.dtype)
    with torch.autocast(values.device.type, enabled=False):
        return blocked.attend_at_backward(
            grad.to(real),
            interest,
            log_sums,
            queries.to(real),
            query_offsets,
            cuts,
            keys.to(real),
            values.to(real),
            offsets,
            scale,
            last,
        )


def _attend_at_backward_fake(
    _grad: Tensor,
    _interest: Tensor,
    _log_sums: Tensor,
    queries: Tensor,
    _query_offsets: Tensor,
    _cuts: Tensor,
    keys: Tensor,
    values: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    real = sums_dtype(values.dtype)
    return (
        queries.new_empty(queries.shape, dtype=real),
        keys.new_empty(keys.shape, dtype=real),
        values.new_empty(values.shape, dtype=real),
    )


def _fused_attend_at_fake(
    queries: Tensor,
    _query_offsets: Tensor | None,
    _cuts: Tensor | None,
    _keys: Tensor | None,
    values: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    log_sums = values.new_empty(queries.shape[0], dtype=torch.float32)
    return values.new_empty(queries.shape[0], values.shape[1]), log_sums


def _fused_attend_at_backward_fake(
    _grad: Tensor,
    _interest: Tensor,
    _log_sums: Tensor,
    queries: Tensor,
    _query_offsets: Tensor | None,
    _cuts: Tensor | None,
    keys: Tensor | None,
    values: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape),
        values.new_empty(0 if keys is None else keys.shape[0], queries.shape[1]),
        values.new_empty(values.shape),
    )


def _window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    checks.check_lengths(lengths, q.shape[1])
    q, k, v = map(_heads_first, (q, k, v))
    with torch.autocast(v.device.type, enabled=False):
        out, log_sums = windowed.attend(q, k, v, Window(window, causal, lengths), scale)
    return out.transpose(1, 2).contiguous(), log_sums


def _heads_first(x: Tensor) -> Tensor:
    return x.to(sums_dtype(x.dtype)).transpose(1, 2)


def _window_fake(q: Tensor, _k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    real = sums_dtype(v.dtype)
    log_sums = v.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=real)
    return v.new_empty(v.shape, dtype=real), log_sums


def _window_backward(
    grad: Tensor,
    out: Tensor,
    log_sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, out, q, k, v = map(_heads_first, (grad, out, q, k, v))
    with torch.autocast(v.device.type, enabled=False):
        grads = windowed.attend_backward(
            grad, out, log_sums, q, k, v, Window(window, causal, lengths), scale
        )
    grad_q, grad_k, grad_v = (x.transpose(1, 2).contiguous() for x in grads)
    return grad_q, grad_k, grad_v


def _window_backward_fake(
    _grad: Tensor, _out: Tensor, _log_sums: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    real = sums_dtype(v.dtype)
    return (
        q.new_empty(q.shape, dtype=real),
        k.new_empty(k.shape, dtype=real),
        v.new_empty(v.shape, dtype=real),
    )


_SCHEMA = (
    "Tensor queries, Tensor query_offsets, Tensor cuts, Tensor keys, Tensor values, "
    "Tensor offsets, float scale, int? last"
)

register("dense_attend_at", f"({_SCHEMA}) -> (Tensor, Tensor)", _attend_at, _attend_at_fake)
register(
    "dense_attend_at_backward",
    f"(Tensor grad, Tensor interest, Tensor log_sums, {_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _attend_at_backward,
    _attend_at_backward_fake,
)

# Triton's: results in the dtype of the rows, nothing of the data checked, for the host would wait
# for it. Keys of None are the values, and the gradient of values then has both parts. Offsets and
# cuts of None are those of Q / B candidates for each user, over whole histories.
_FUSED = (
    "Tensor queries, Tensor? query_offsets, Tensor? cuts, Tensor? keys, Tensor values, "
    "Tensor offsets, float scale, int? last"
)

register(
    "dense_fused_attend_at",
    f"({_FUSED}) -> (Tensor, Tensor)",
    implemented_in("hashtab.kernels.dense.triton", "attend_at"),
    _fused_attend_at_fake,
)
register(
    "dense_fused_attend_at_backward",
    f"(Tensor grad, Tensor interest, Tensor log_sums, {_FUSED}) -> (Tensor, Tensor, Tensor)",
    implemented_in("hashtab.kernels.dense.triton", "attend_at_backward"),
    _fused_attend_at_backward_fake,
)

_WINDOW = "Tensor q, Tensor k, Tensor v, int window, bool causal, Tensor? lengths, float scale"

register("dense_window", f"({_WINDOW}) -> (Tensor, Tensor)", _window, _window_fake)
register(
    "dense_window_backward",
    f"(Tensor grad, Tensor out, Tensor log_sums, {_WINDOW}) -> (Tensor, Tensor, Tensor)",
    _window_backward,
    _window_backward_fake,
)
