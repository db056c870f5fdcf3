"""SDIM's definition in PyTorch (arXiv 2205.10249), on any device.

Symbols: D size of a vector, M planes, tau bits a group, G = M / tau groups, s_j behaviours,
q candidates, S[g, b] the bucket sums. B users, N behaviours, Q queries.

The operators read sums of contiguous runs of sorted rows, as differences of float64 prefix sums:
no `[Q, N]` and no `[B, L, G, D]` tensor, no atomics, no loop over users. Their rounding is that
of the whole batch's float64 sums: far below float32's for histories of like size, but a history of
values beyond 1e8 times another's reaches that one's digits, and a NaN reaches all.
`attend_at_by_mask` is the same thing written as a sum over all pairs.
"""

import torch
from torch import Tensor

from hashtab.kernels.core.precision import float32_product, sums_dtype
from hashtab.kernels.core.ragged import segment_of

_ROWS_AT_ONCE = 65_536  # bounds the [rows, M] products in memory


def codes(x: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Return the bucket of each row in each group.

    Args:
        x: `[N, D]`.
        planes: `[D, M]`.
        tau: bits a group.

    Returns:
        `[N, G]` int32: bits `x . R[:, m] > 0`, a group's first plane is its lowest bit.
    """
    groups = planes.shape[1] // tau
    out = torch.empty(x.shape[0], groups, dtype=torch.int32, device=x.device)
    powers = 2 ** torch.arange(tau, dtype=torch.int32, device=x.device)
    for i in range(0, x.shape[0], _ROWS_AT_ONCE):
        bits = float32_product(x[i : i + _ROWS_AT_ONCE], planes) > 0
        weighted = bits.view(-1, groups, tau) * powers
        out[i : i + _ROWS_AT_ONCE] = weighted.sum(-1, dtype=torch.int32)
    return out


def encode(values: Tensor, offsets: Tensor, codes: Tensor, tau: int) -> Tensor:
    """Return the table `[B, G, 2**tau, D]` of sums S[g, b] = sum of s_j with code_g(s_j) = b."""
    users, size, buckets = offsets.shape[0] - 1, values.shape[1], 2**tau
    user = segment_of(offsets, values.shape[0])
    wanted = torch.arange(users * buckets, device=values.device)
    groups = []
    for code in codes.unbind(1):
        sums = _Runs(values, user * buckets + code).between(wanted, wanted + 1)
        groups.append(sums.view(users, buckets, size))
    return torch.stack(groups, dim=1).to(sums_dtype(values.dtype))


def encode_backward(grad_table: Tensor, offsets: Tensor, codes: Tensor) -> Tensor:
    """Return the gradient `[N, D]`: each behaviour collects the gradients of its G rows."""
    user = segment_of(offsets, codes.shape[0])
    grad = grad_table.new_zeros(codes.shape[0], grad_table.shape[3])
    for g, code in enumerate(codes.long().unbind(1)):
        grad += grad_table[user, g, code]
    return grad


def read(table: Tensor, codes: Tensor) -> Tensor:
    """Return the interest `[B, C, D]`, the mean over G of S[g, code_g(q)] / |S[g, code_g(q)]|."""
    user = torch.arange(table.shape[0], device=table.device)[:, None]
    shape = (table.shape[0], codes.shape[1], table.shape[3])
    interest = torch.zeros(shape, dtype=torch.float64, device=table.device)
    for g, code in enumerate(codes.long().unbind(2)):
        interest += _normalise(table[user, g, code].double())
    return (interest / codes.shape[2]).to(table.dtype)


def read_backward(grad: Tensor, table: Tensor, codes: Tensor) -> Tensor:
    """Return the gradient of the table `[B, G, 2**tau, D]`."""
    (users, candidates, groups), buckets = codes.shape, table.shape[2]
    user = torch.arange(users, device=table.device)[:, None].expand(users, candidates)
    wanted = torch.arange(users * buckets, device=table.device)
    out = torch.empty_like(table, memory_format=torch.contiguous_format)
    for g, code in enumerate(codes.long().unbind(2)):
        rows = _normalise_backward(grad.double() / groups, table[user, g, code].double())
        runs = _Runs(rows.flatten(0, 1), (user * buckets + code).flatten())
        out[:, g] = runs.between(wanted, wanted + 1).view_as(out[:, g])
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
    """Return the interest `[Q, D]` of each query in the behaviours before its cut.

    Behaviours are sorted by (user, bucket, time); those that a query shares a bucket with are
    then one run.
    """
    time = _Clock(offsets, query_offsets, cuts, tau, last)
    interest = torch.zeros(cuts.shape[0], values.shape[1], device=values.device).double()
    for code, query_code in zip(codes.unbind(1), query_codes.unbind(1), strict=True):
        interest += _normalise(time.sums(values, code, query_code))
    return (interest / codes.shape[1]).to(sums_dtype(values.dtype))


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
    """Return the gradient of the behaviours `[N, D]`.

    The mirror of the forward pass: queries are sorted by (user, bucket, cut), and those that see
    a behaviour are one run.
    """
    time = _Clock(offsets, query_offsets, cuts, tau, last)
    out = torch.zeros(values.shape, dtype=torch.float64, device=values.device)
    for code, query_code in zip(codes.unbind(1), query_codes.unbind(1), strict=True):
        sums = time.sums(values, code, query_code)
        rows = _normalise_backward(grad.double() / codes.shape[1], sums)
        out += time.sums_of_queries(rows, code, query_code)
    return out.to(sums_dtype(values.dtype))


def attend_at_by_mask(
    values: Tensor,
    offsets: Tensor,
    codes: Tensor,
    query_codes: Tensor,
    query_offsets: Tensor,
    cuts: Tensor,
    last: int | None = None,
    *,
    normalise: bool = True,
) -> Tensor:
    """Return `attend_at` from `[Q, N]` masks, differentiable by autograd; a test's oracle."""
    user, query_user = (
        segment_of(offsets, values.shape[0]),
        segment_of(query_offsets, cuts.shape[0]),
    )
    position = torch.arange(values.shape[0], device=values.device) - offsets[user]
    begin = torch.zeros_like(cuts) if last is None else cuts - last
    seen = (user == query_user[:, None]) & (position < cuts[:, None])
    seen &= position >= begin[:, None]
    interest = values.new_zeros(cuts.shape[0], values.shape[1])
    for g in range(codes.shape[1]):
        shared = seen & (codes[:, g] == query_codes[:, None, g])
        sums = shared.to(values.dtype) @ values
        interest = interest + (_normalise(sums) if normalise else sums)
    return interest / codes.shape[1]


class _Runs:
    """Rows sorted by an integer key, and sums over ranges of keys.

    Args:
        rows: `[N, D]`.
        keys: `[N]` int64.
    """

    def __init__(self, rows: Tensor, keys: Tensor) -> None:
        self.keys, order = keys.sort(stable=True)
        # Transposed, for a scan along the last dimension is parallel on a GPU.
        sums = rows.t().double()[:, order].cumsum(1)
        self.prefix = torch.nn.functional.pad(sums, (1, 0)).t()

    def between(self, begin: Tensor, end: Tensor) -> Tensor:
        """Return `[P, D]` float64: for each of P ranges the sum of rows, begin <= key < end."""
        first, behind = torch.searchsorted(self.keys, torch.stack([begin, end]))
        sums: Tensor = self.prefix[behind] - self.prefix[first]
        return sums


class _Clock:
    """Keys (user, bucket, time) for behaviours at their position and for queries at their cut."""

    def __init__(
        self, offsets: Tensor, query_offsets: Tensor, cuts: Tensor, tau: int, last: int | None
    ) -> None:
        n = int(offsets[-1])
        self.buckets: int = 2**tau
        self.user = segment_of(offsets, n)
        self.query_user = segment_of(query_offsets, cuts.shape[0])
        self.position = torch.arange(n, device=offsets.device) - offsets[self.user]
        self.cuts = cuts
        self.last = n if last is None else min(last, n)
        self.period = n + 2  # times of a behaviour or a query lie within 0 .. n + 1

    def sums(self, values: Tensor, code: Tensor, query_code: Tensor) -> Tensor:
        """Return for each query the sum of the behaviours it sees in its bucket, `[Q, D]`."""
        runs = _Runs(values, self._key(self.user, code, self.position))
        begin = (self.cuts - self.last).clamp(min=0)
        return runs.between(
            self._key(self.query_user, query_code, begin),
            self._key(self.query_user, query_code, self.cuts),
        )

    def sums_of_queries(self, rows: Tensor, code: Tensor, query_code: Tensor) -> Tensor:
        """Return for each behaviour the sum of `rows` `[Q, D]` of the queries that see it."""
        runs = _Runs(rows, self._key(self.query_user, query_code, self.cuts))
        latest = (self.position + self.last + 1).clamp(max=self.period - 1)
        return runs.between(
            self._key(self.user, code, self.position + 1), self._key(self.user, code, latest)
        )

    def _key(self, user: Tensor, code: Tensor, time: Tensor) -> Tensor:
        return (user * self.buckets + code) * self.period + time


def _normalise(rows: Tensor) -> Tensor:
    """Return rows / |row|, zeros (and zero gradient) for a row of zeros."""
    square = rows.square().sum(-1, keepdim=True)
    return rows * _inverse_root(square)


def _normalise_backward(upstream: Tensor, rows: Tensor) -> Tensor:
    """Return the gradient of `_normalise`: (upstream - u (u . upstream)) / |row|."""
    square = rows.square().sum(-1, keepdim=True)
    scale = _inverse_root(square)
    unit = rows * scale
    return scale * (upstream - unit * (unit * upstream).sum(-1, keepdim=True))


def _inverse_root(square: Tensor) -> Tensor:
    """Return 1 / sqrt(square), and 0 where it is 0."""
    return torch.rsqrt(torch.where(square > 0, square, torch.inf))
