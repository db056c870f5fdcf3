"""Checks of arguments that operators share; each names the argument, its value and the rule."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_TAU = 16


def check_rows(name: str, rows: Tensor, shape: str, size: int | None = None) -> None:
    """Refuse `rows` unless they are floating, of `shape` such as `[N, D]`, and D equals `size`."""
    if rows.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point, got {rows.dtype}")
    if rows.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must be {shape}, got {tuple(rows.shape)}")
    if size is not None and rows.shape[-1] != size:
        raise ValueError(f"{name} must be {shape} with D = {size}, got {tuple(rows.shape)}")


def check_index(name: str, index: Tensor) -> None:
    """Refuse an index tensor that is not one-dimensional int64."""
    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got {tuple(index.shape)}")


def check_bounds(name: str, offsets: Tensor) -> None:
    """Refuse offsets whose dtype or shape cannot be right, or that are of no user, not even one."""
    check_index(name, offsets)
    if offsets.shape[0] == 0:
        raise ValueError(f"{name} must be [B + 1] and begin with 0, got none")


def check_ids(ids: Tensor, table: Tensor) -> None:
    """Refuse ids of rows of `table` `[V, D]` that are not one-dimensional int32 or int64."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(f"ids must have one dimension, got {tuple(ids.shape)}")
    check_same_device(values=table, ids=ids)
    if table.shape[0] == 0 and ids.shape[0] > 0:
        raise ValueError(f"ids must be of rows of values, which has none, got {ids.shape[0]} ids")


def check_same_device(**tensors: Tensor) -> None:
    """Refuse tensors that lie on different devices."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        placed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {placed}")


def check_tau(tau: int) -> None:
    """Refuse a number of bits that codes cannot have."""
    if not isinstance(tau, int):
        raise TypeError(f"tau must be an int, got {tau=}")
    if not 1 <= tau <= MAX_TAU:
        raise ValueError(f"tau must lie within 1 .. {MAX_TAU}, got {tau=}")


def check_planes(planes: Tensor, tau: int) -> None:
    """Refuse planes that are not `[D, M]`, or a `tau` outside 1 .. 16 or not dividing M."""
    check_rows("planes", planes, "[D, M]")
    if planes.shape[0] == 0:
        raise ValueError(f"planes must be [D, M] with D of at least 1, got {tuple(planes.shape)}")
    check_tau(tau)
    m = planes.shape[1]
    if m == 0 or m % tau:
        raise ValueError(f"tau must divide the number of planes, got {tau=}, M={m}")


def check_users(name: str, users: int, offsets: Tensor) -> None:
    """Refuse rows for another number of users than `offsets` `[B + 1]` tell."""
    if offsets.shape[0] != users + 1:
        raise ValueError(
            f"offsets must be [B + 1] for the B = {users} users of {name}, "
            f"got {tuple(offsets.shape)}"
        )


def check_queries(
    queries: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    offsets: Tensor,
    size: int,
    last: int | None,
) -> None:
    """Refuse queries, their offsets and cuts whose shapes or dtypes do not fit together."""
    check_rows("queries", queries, "[Q, D]", size)
    check_bounds("query_offsets", query_offsets)
    check_index("cuts", cuts)
    check_users("query_offsets", query_offsets.shape[0] - 1, offsets)
    if cuts.shape[0] != queries.shape[0]:
        raise ValueError(
            f"cuts must have one entry for each of the {queries.shape[0]} queries, "
            f"got {cuts.shape[0]}"
        )
    if query_offsets.shape[0] == 1 and queries.shape[0] > 0:
        raise ValueError(f"query_offsets are of no user, got {queries.shape[0]} queries")
    check_last(last)


def check_last(last: int | None) -> None:
    """Refuse a number of latest behaviours that is none."""
    if last is None:
        return
    if not isinstance(last, int):
        raise TypeError(f"last must be an int or None, got {last=}")
    if last < 1:
        raise ValueError(f"last must be at least 1, got {last=}")
    if last >= 2**63:
        raise ValueError(f"last must be below 2**63 (None is for all behaviours), got {last=}")


def check_offsets(name: str, offsets: Tensor, n: int, rows: str) -> None:
    """Refuse offsets that do not ascend from 0 to `n`, the number of `rows`."""
    check_bounds(name, offsets)
    good = (offsets[0] == 0) & (offsets[-1] == n) & (offsets.diff() >= 0).all()
    if not bool(good):
        raise ValueError(
            f"{name} must start at 0, ascend, and end at the number of {rows}, {n}; "
            f"got first {int(offsets[0])}, last {int(offsets[-1])}, "
            f"smallest step {int(offsets.diff().min()) if len(offsets) > 1 else 0}"
        )


def check_items(ids: Tensor, items: int) -> None:
    """Refuse ids outside 0 .. items - 1."""
    wrong = (ids < 0) | (ids >= items)
    if bool(wrong.any()):
        i = int(wrong.int().argmax())
        raise ValueError(f"ids must lie within 0 .. {items - 1}, got ids[{i}] = {int(ids[i])}")


def check_lengths(lengths: Tensor | None, limit: int) -> None:
    """Refuse lengths outside 0 .. limit; None stands for no padding."""
    if lengths is None:
        return
    wrong = (lengths < 0) | (lengths > limit)
    if bool(wrong.any()):
        raise ValueError(f"lengths must lie within 0 .. {limit}, got {lengths[wrong].tolist()[:5]}")


def check_codes(name: str, codes: Tensor, shape: tuple[int, ...], buckets: int) -> None:
    """Refuse codes that are not int32 of `shape` within [0, buckets), for they are addresses."""
    if codes.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {codes.dtype}")
    if codes.shape != shape:
        raise ValueError(f"{name} must be of shape {shape}, got {tuple(codes.shape)}")
    if codes.numel() == 0:
        return
    low, high = (int(bound) for bound in codes.aminmax())
    if low < 0 or high >= buckets:
        raise ValueError(f"{name} must lie within [0, {buckets}), got {low} .. {high}")


def check_cuts(offsets: Tensor, cuts: Tensor, user: Tensor) -> None:
    """Refuse cuts outside their user's history, or that fall within a user.

    Args:
        offsets: `[B + 1]` int64, checked.
        cuts: `[Q]` int64.
        user: `[Q]` int64, the user of each query.
    """
    outside = (cuts < 0) | (cuts > offsets.diff()[user])
    falls = torch.zeros_like(outside)
    falls[1:] = (cuts.diff() < 0) & (user.diff() == 0)
    if not bool((outside | falls).any()):
        return
    i = int((outside | falls).int().argmax())
    if bool(outside[i]):
        length = int(offsets.diff()[user[i]])
        raise ValueError(
            f"cuts must lie within the history of their user, got cuts[{i}] = {int(cuts[i])} "
            f"for user {int(user[i])} with {length} behaviours"
        )
    raise ValueError(
        f"cuts must ascend within a user, got cuts[{i}] = {int(cuts[i])} after {int(cuts[i - 1])}"
    )
