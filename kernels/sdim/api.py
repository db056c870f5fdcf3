"""SDIM: hash-sampled attention over long histories (arXiv 2205.10249), the public functions.

A behaviour or candidate falls into one bucket of each of G groups, by the signs of its products
with fixed hash planes. A candidate's interest is the mean over the groups of the l2-normalised
sum of the behaviours in its bucket; an empty bucket counts as zeros. Gradients reach behaviours
through the sums; codes are constants, so candidates and planes get none.

All functions take `impl`: `"reference"` (the definition in PyTorch), `"native"` (C, on CPUs),
`"triton"` (GPUs), or `"auto"`, the fastest that can run here; another choice that cannot run raises
RuntimeError with the reason, and all give the same result up to rounding. Values may be float16,
bfloat16, float32 or, but for Triton, float64. Hashing is float32 from the values as stored, sums
are float32 or better (float64 for float64 values), interests have the dtype of the values.

With `ids` `[N]`, int64 or int32, behaviour j is row `ids[j]` of `values` `[V, D]`, a table of
embeddings: the result is that of `values.index_select(0, ids)`, which Triton's kernels never write,
and offsets count ids. The gradient of `values` is `[V, D]`, for each row the sum of those of its
behaviours and zeros for one that nobody met; Triton's kernels sum it in float32 and a fixed order.

`"triton"` never waits for the GPU: what only the content of offsets, cuts and ids could tell is
then not checked. Wrong ones read and write nothing that is not theirs, but the result and its
gradient mean nothing; an id outside 0 .. V - 1 counts as 0.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hashtab.kernels.core import checks
from hashtab.kernels.core.dispatch import check_impl, use_triton
from hashtab.kernels.core.library import apply
from hashtab.kernels.core.precision import sums_dtype
from hashtab.kernels.core.ragged import to_padded
from hashtab.kernels.sdim import fused
from hashtab.kernels.sdim import ops as _ops  # noqa: F401  registers torch.ops.hashtab.sdim_*

Impl = Literal["auto", "reference", "native", "triton"]

_hashtab = torch.ops.hashtab


def codes(x: Tensor, planes: Tensor, tau: int, *, impl: Impl = "auto") -> Tensor:
    """Hash vectors to the code of their bucket in each group.

    Bit m of the signature is `x . planes[:, m] > 0`, computed in float32 even under autocast;
    group g holds bits g tau .. (g + 1) tau, the first is the lowest.

    Args:
        x: `[..., D]`, behaviours or candidates; never padding.
        planes: `[D, M]`, standard normal, fixed for the life of a model.
        tau: bits a group, 1 .. 16, dividing M.
        impl: which implementation; see the module.

    Returns:
        `[..., G]` int32 within 0 .. 2**tau - 1, where G = M / tau. No gradient.

    Raises:
        TypeError: a dtype is not floating point.
        ValueError: shapes disagree, or tau does not divide M or lies outside 1 .. 16.

    >>> codes(torch.tensor([[1.0, -1.0]]), torch.eye(2), tau=2)
    tensor([[1]], dtype=torch.int32)
    """
    check_impl(impl, get_args(Impl))
    checks.check_planes(planes, tau)
    checks.check_rows("x", x, "[" + "..., " * (x.dim() - 1) + "D]", planes.shape[0])
    checks.check_same_device(x=x, planes=planes)
    chosen = _choice(impl, planes, tau, x)
    result: Tensor = _hashtab.sdim_codes(x.detach(), planes.detach(), tau, chosen)
    return result


def encode(
    values: Tensor,
    offsets: Tensor,
    planes: Tensor,
    tau: int,
    *,
    ids: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Sum each user's behaviours by bucket. Additive over behaviours, whatever their order.

    Of the gradient of bfloat16 behaviours, Triton's kernels keep what is above 1e-5 of the largest
    that the user's table has in a column.

    Args:
        values: `[N, D]`, the behaviours of all users, user after user; or with `ids` the table
            `[V, D]`.
        offsets: `[B + 1]` int64, first 0, last N.
        planes: `[D, M]`.
        tau: bits a group.
        ids: `[N]` int64 or int32, the row of `values` that each behaviour is; the gradient of
            `values` `[V, D]` is then summed by row. See the module.
        impl: which implementation; see the module.

    Returns:
        Table `[B, G, 2**tau, D]` of raw sums, float32 (float64 for float64 values).

    Raises:
        TypeError: a dtype or the kind of a number is wrong.
        ValueError: shapes, offsets, ids or tau are wrong.
    """
    _check_history(values, offsets, planes, tau, ids, impl)
    if _choice(impl, planes, tau, values) == "triton":
        return fused.encode(values, offsets, planes, tau, ids)
    values = _behaviours(values, ids)
    keys = codes(values, planes, tau, impl=impl)
    return apply(_Encode, values, offsets, keys, tau, impl)


def read(
    table: Tensor, queries: Tensor, planes: Tensor, tau: int, *, impl: Impl = "auto"
) -> Tensor:
    """Read candidates' interests from bucket tables.

    Args:
        table: `[B, G, 2**tau, D]`, raw sums as `encode` returns them, float32 or float64.
        queries: `[B, C, D]`, candidates of each user.
        planes: `[D, M]`, those which made the table.
        tau: bits a group.
        impl: which implementation; see the module.

    Returns:
        `[B, C, D]` in the table's dtype.

    Raises:
        TypeError: a dtype or the kind of a number is wrong.
        ValueError: shapes or tau are wrong.
    """
    check_impl(impl, get_args(Impl))
    checks.check_planes(planes, tau)
    size, m = planes.shape
    checks.check_rows("queries", queries, "[B, C, D]", size)
    shape = (queries.shape[0], m // tau, 2**tau, size)
    if table.shape != shape:
        raise ValueError(f"table must be [B, G, 2**tau, D] = {shape}, got {tuple(table.shape)}")
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"table must be float32 or float64, got {table.dtype}")
    checks.check_same_device(table=table, queries=queries, planes=planes)
    if _choice(impl, planes, tau, table, queries) == "triton":
        return fused.read(table, queries, planes, tau)
    return apply(_Read, table, codes(queries, planes, tau, impl=impl), impl)


def attend(
    values: Tensor,
    offsets: Tensor,
    queries: Tensor,
    planes: Tensor,
    tau: int,
    *,
    ids: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return the interests of candidates in whole histories, as `read(encode(...))` would.

    Args:
        values: `[N, D]`, behaviours; or with `ids` the table `[V, D]`.
        offsets: `[B + 1]` int64, first 0, last N.
        queries: `[B, C, D]`, candidates of each user.
        planes: `[D, M]`.
        tau: bits a group.
        ids: `[N]` int64 or int32, the row of `values` that each behaviour is; the gradient of
            `values` `[V, D]` is then summed by row. See the module.
        impl: which implementation; see the module.

    Returns:
        `[B, C, D]` in the dtype of `values`; zeros for an empty history.

    Raises:
        TypeError: a dtype or the kind of a number is wrong.
        ValueError: shapes, offsets, ids or tau are wrong.
    """
    _check_history(values, offsets, planes, tau, ids, impl)
    checks.check_rows("queries", queries, "[B, C, D]", values.shape[1])
    checks.check_users("queries", queries.shape[0], offsets)
    checks.check_same_device(values=values, queries=queries)
    if _choice(impl, planes, tau, values, queries) == "triton":
        return fused.attend(values, offsets, queries, planes, tau, ids)
    candidates = queries.shape[1]
    query_offsets = torch.arange(offsets.shape[0], device=offsets.device) * candidates
    cuts = offsets.diff()[:, None].expand(-1, candidates).flatten()
    flat = queries.flatten(0, 1)
    rows = attend_at(values, offsets, flat, query_offsets, cuts, planes, tau, ids=ids, impl=impl)
    return rows.view(queries.shape)


def attend_at(
    values: Tensor,
    offsets: Tensor,
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    planes: Tensor,
    tau: int,
    *,
    last: int | None = None,
    ids: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return the interest of each query in its user's behaviours before the query's cut.

    One walk over a history serves all of its queries, backward again: memory grows with behaviours
    plus queries, not with their product; for backward, values and codes are kept. So does time, but
    on a GPU for codes that its walks are not for, of which `explain` says why.

    Walks in bfloat16 take a bucket for empty in backward, and with `last`, while its sum is below
    2^-16 of the most that it has been: that is rounding which others left.

    Args:
        values: `[N, D]`, behaviours in time order within a user; or with `ids` the table `[V, D]`.
        offsets: `[B + 1]` int64, first 0, last N.
        queries: `[Q, D]`, candidates; those of user u are rows query_offsets[u] up to
            query_offsets[u + 1].
        query_offsets: `[B + 1]` int64, first 0, last Q.
        cuts: `[Q]` int64, ascending within a user: query i sees the first cuts[i] behaviours.
        planes: `[D, M]`.
        tau: bits a group.
        last: of those the latest `last` only; None for all.
        ids: `[N]` int64 or int32, the row of `values` that each behaviour is; the gradient of
            `values` `[V, D]` is then summed by row. See the module.
        impl: which implementation; see the module.

    Returns:
        `[Q, D]` in the dtype of `values`; zeros where a query sees no behaviour.

    Raises:
        TypeError: a dtype or the kind of a number is wrong.
        ValueError: shapes, offsets, ids, cuts, tau or last are wrong.
    """
    _check_history(values, offsets, planes, tau, ids, impl)
    checks.check_queries(queries, query_offsets, cuts, offsets, values.shape[1], last)
    checks.check_same_device(values=values, queries=queries, query_offsets=query_offsets, cuts=cuts)
    if _choice(impl, planes, tau, values, queries) == "triton":
        at = (query_offsets, cuts, planes, tau, last)
        return fused.attend_at(values, offsets, queries, *at, ids)
    values = _behaviours(values, ids)
    keys = (codes(values, planes, tau, impl=impl), codes(queries, planes, tau, impl=impl))
    interest = apply(_AttendAt, values, offsets, *keys, query_offsets, cuts, tau, last, impl)
    return interest.to(values.dtype)


def expected(
    values: Tensor, offsets: Tensor, queries: Tensor, tau: int, *, impl: Impl = "auto"
) -> Tensor:
    """Return what the sampled form without its norm converges to as planes are added.

    Behaviour s weighs (1 - arccos(cos(q, s)) / pi)**tau, the chance that it shares a bucket of
    tau bits with q (section 4.3 of the paper); the weights are constants for autograd, as codes
    are. For study and tests: the per-bucket norm of `attend` ranks better.

    Args:
        values: `[N, D]`, behaviours.
        offsets: `[B + 1]` int64, first 0, last N.
        queries: `[B, C, D]`, candidates of each user.
        tau: bits a group.
        impl: which implementation; see the module.

    Returns:
        `[B, C, D]` un-normalised sums in the dtype of `values`.

    Raises:
        RuntimeError: an `impl` that this function does not have.
        TypeError: a dtype or the kind of a number is wrong.
        ValueError: shapes, offsets or tau are wrong.
    """
    check_impl(impl, get_args(Impl))
    if impl in ("native", "triton"):
        raise RuntimeError(f"{impl=} cannot run: expected has its definition only")
    checks.check_tau(tau)
    checks.check_rows("values", values, "[N, D]")
    checks.check_bounds("offsets", offsets)
    checks.check_same_device(values=values, offsets=offsets, queries=queries)
    checks.check_offsets("offsets", offsets, values.shape[0], "behaviours")
    checks.check_rows("queries", queries, "[B, C, D]", values.shape[1])
    checks.check_users("queries", queries.shape[0], offsets)
    real = sums_dtype(values.dtype)
    padded = to_padded(values.to(real), offsets)
    with torch.autocast(values.device.type, enabled=False):
        with torch.no_grad():
            cosines = _unit(queries.to(real)) @ _unit(padded).mT
            weights = (1 - cosines.clamp(-1, 1).arccos() / torch.pi) ** tau
        return (weights @ padded).to(values.dtype)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _check_history(
    values: Tensor, offsets: Tensor, planes: Tensor, tau: int, ids: Tensor | None, impl: str
) -> None:
    check_impl(impl, get_args(Impl))
    checks.check_planes(planes, tau)
    checks.check_rows("values", values, "[N, D]", planes.shape[0])
    checks.check_bounds("offsets", offsets)
    checks.check_same_device(values=values, offsets=offsets, planes=planes)
    if ids is not None:
        checks.check_ids(ids, values)


def _choice(impl: str, planes: Tensor, tau: int, *rows: Tensor) -> str:
    """Return `"triton"` where its kernels compute an operator of `rows`, else `impl`."""
    if use_triton(impl, planes.device, fused.why_unfit(planes, tau, *rows)):
        return "triton"
    return impl


def _behaviours(values: Tensor, ids: Tensor | None) -> Tensor:
    """Return the behaviours `[N, D]`, after a check of ids."""
    if ids is None:
        return values
    checked: Tensor = _hashtab.sdim_checked_ids(ids, values.shape[0])
    return values.index_select(0, checked)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, offsets: Tensor, codes: Tensor, tau: int, impl: str
    ) -> Tensor:
        ctx.save_for_backward(offsets, codes)
        ctx.dtype, ctx.impl = values.dtype, impl
        table: Tensor = _hashtab.sdim_encode(values, offsets, codes, tau, impl)
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = _hashtab.sdim_encode_backward(grads[0], *ctx.saved_tensors, ctx.impl)
        return grad.to(ctx.dtype), None, None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, codes: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(table, codes)
        ctx.impl = impl
        interest: Tensor = _hashtab.sdim_read(table, codes, impl)
        return interest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = _hashtab.sdim_read_backward(grads[0], *ctx.saved_tensors, ctx.impl)
        return grad, None, None


class _AttendAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, tau, last, impl = arguments
        ctx.save_for_backward(*tensors)
        ctx.settings = (tau, last, impl)
        interest: Tensor = _hashtab.sdim_attend_at(*tensors, *ctx.settings)
        return interest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values = ctx.saved_tensors[0]
        grad = _hashtab.sdim_attend_at_backward(grads[0], *ctx.saved_tensors, *ctx.settings)
        return grad.to(values.dtype), *[None] * 8
