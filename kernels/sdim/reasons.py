"""What would compute an operator of SDIM, and why."""

from typing import Literal, get_args

from torch import Tensor

from hashtab.kernels.core import checks, dispatch, native
from hashtab.kernels.sdim import fused
from hashtab.kernels.sdim.api import Impl
from hashtab.kernels.sdim.native import SOURCE
from hashtab.kernels.sdim.packing import Packing

Operator = Literal["codes", "encode", "read", "attend", "attend_at"]


def explain(
    operator: Operator,
    rows: Tensor,
    planes: Tensor,
    tau: int,
    *,
    candidates: int = 1,
    last: int | None = None,
    impl: Impl = "auto",
) -> str:
    """Say which implementation and which algorithm an operator would run, and for what reason.

    Args:
        operator: its name.
        rows: `[N, D]`, what it sums or, for `codes` and `read`, hashes; only shape, dtype and
            device count.
        planes: `[D, M]`.
        tau: bits a group.
        candidates: of a user, for `attend`.
        last: as in `attend_at`.
        impl: which implementation is asked for.

    Returns:
        The implementation, a colon, and the algorithm or the reason.

    Raises:
        RuntimeError: an implementation was asked for that cannot run, with the reason.
        TypeError: a dtype is not floating point.
        ValueError: an unknown name, or shapes, tau, candidates or last are wrong.

    >>> import torch
    >>> explain("encode", torch.ones(3, 2), torch.eye(2), tau=2, impl="reference")
    'reference: asked for'
    """
    if operator not in get_args(Operator):
        raise ValueError(f"operator must be one of {get_args(Operator)}, got {operator=}")
    dispatch.check_impl(impl, get_args(Impl))
    checks.check_planes(planes, tau)
    checks.check_rows("rows", rows, "[N, D]", planes.shape[0])
    checks.check_same_device(rows=rows, planes=planes)
    checks.check_last(last)
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates=}")
    unfit = fused.why_unfit(planes, tau, rows)
    if dispatch.use_triton(impl, planes.device, unfit):
        return f"triton: {_algorithm(operator, rows, planes, tau, candidates, last)}"
    if dispatch.use_native(impl, planes.device, SOURCE):
        return "native: C, compiled for this CPU"
    if impl == "reference":
        return "reference: asked for"
    if planes.device.type == "cpu":
        return f"reference: {native.why_not(SOURCE)}"
    return f"reference: {dispatch.why_not_triton(planes.device) or unfit}"


def _algorithm(
    operator: Operator, rows: Tensor, planes: Tensor, tau: int, candidates: int, last: int | None
) -> str:
    from hashtab.kernels.sdim.triton import attend, encode, read
    from hashtab.kernels.sdim.triton.hashing import hashes_within

    packing = Packing(tau, planes.shape[1] // tau)
    if operator == "attend_at":
        reason = packing.why_no_walk(rows, last)
        if reason is None:
            return "walks over each history from cut to cut"
        return f"masks of queries and behaviours, not walks: {reason}"
    if operator == "attend" and fused.through_a_table(candidates, tau):
        return f"a table, for {candidates} candidates are more than its {2**tau} buckets a group"
    if operator == "attend":
        blocks = attend.blocks_of(candidates, packing, rows)
        once = blocks <= 1 and hashes_within(packing, rows)
        return f"{_reads(once, blocks)}, without a table"
    if operator == "encode":
        blocks = encode.blocks_of(packing, rows)
        return f"{_reads(encode.reads_once(packing, rows), blocks)} into tables"
    if operator == "read" and read.holds_tables(packing, rows):
        return "products with whole tables, normalised once"
    if operator == "read":
        return "the rows of tables that candidates fall into"
    return "a hash of all rows"


def _reads(once: bool, blocks: int) -> str:
    if once:
        return "one read of the behaviours"
    return f"a hash of the behaviours and then {blocks} {'reads' if blocks > 1 else 'read'}"
