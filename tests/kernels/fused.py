"""SDIM by its Triton kernels and by its definition on one history, and how near they must be.

On a CPU kernels run interpreted, a tile in milliseconds, and bfloat16 products are wrong there: so
histories are small and bfloat16 is for a GPU, where the same tests run with longer ones.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hashtab.kernels import sdim
from hashtab.kernels.core.precision import sums_dtype
from hashtab.kernels.sdim import triton
from hashtab.kernels.sdim.api import Impl
from tests.kernels.histories import Histories, offsets_of
from tests.tolerances import TOLERANCE

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
LENGTHS = [0, 1, 63, 0, 111, *([1000, 5000, 0, 17, 2049] if GPU else []), 0]

FLOAT32_LIKE = 2e-6  # sums in another order, in three parts of a float32 on a GPU
ON_PLANE = 2.0**-20  # of |x| |r|: rounding may decide on which side x lies

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Case(NamedTuple):
    """A dtype of behaviours, their size, and codes."""

    dtype: torch.dtype
    size: int
    tau: int
    groups: int


_CASES = [
    Case(torch.float32, 8, 1, 64),
    Case(torch.float32, 8, 2, 32),
    Case(torch.float32, 24, 1, 1),
    Case(torch.float32, 40, 3, 16),
    Case(torch.float32, 40, 4, 10),
    Case(torch.float32, 60, 10, 1),
    Case(torch.float32, 128, 5, 4),
    Case(torch.float32, 256, 3, 16),
    Case(torch.float16, 24, 2, 5),
    Case(torch.float16, 64, 1, 64),
    Case(torch.float16, 64, 3, 16),
    Case(torch.float16, 100, 4, 10),
    Case(torch.float16, 128, 7, 3),
    Case(torch.float16, 256, 3, 7),
    Case(torch.bfloat16, 8, 3, 16),
    Case(torch.bfloat16, 24, 1, 3),
    Case(torch.bfloat16, 24, 1, 64),
    Case(torch.bfloat16, 60, 8, 16),
    Case(torch.bfloat16, 64, 3, 16),
    Case(torch.bfloat16, 100, 1, 32),
    Case(torch.bfloat16, 100, 10, 2),
    Case(torch.bfloat16, 128, 3, 64),
    Case(torch.bfloat16, 256, 3, 32),
    Case(torch.bfloat16, 256, 6, 16),
]
# Wide rows of float16 on a GPU alone: interpreted they take long, and show what float32 does.
CASES = [
    case
    for case in _CASES
    if case.dtype in DTYPES and (GPU or case.dtype == torch.float32 or case.size < 64)
]
cases = pytest.mark.parametrize(
    "case", CASES, ids=["-".join(map(str, case)).removeprefix("torch.") for case in CASES]
)


def draw(lengths: list[int], case: Case, *, queries: int = 5, seed: int = 0) -> Histories:
    """Draw histories on the device of these tests; no vector lies on a plane but for rounding."""
    dtype, size, tau, groups = case
    h = Histories.random(
        lengths, size=size, planes=tau * groups, queries=queries, dtype=dtype, seed=seed
    )
    h = replace(h, values=_off_planes(h.values, h.planes), queries=_off_planes(h.queries, h.planes))
    return replace(h, **{name: tensor.to(DEVICE, copy=True) for name, tensor in vars(h).items()})


def _off_planes(x: Tensor, planes: Tensor) -> Tensor:
    """Put zeros in place of rows whose codes another order of float32 sums might change."""
    return x.masked_fill(on_plane(x, planes, 4 * ON_PLANE).any(1, keepdim=True), 0)


def on_plane(x: Tensor, planes: Tensor, share: float = ON_PLANE) -> Tensor:
    """Return `[N, M]`, whether |x . r| is within a small share of |x| |r|."""
    x, planes = x.double(), planes.double()
    near: Tensor = (x @ planes).abs() <= share * x.norm(dim=1, keepdim=True) * planes.norm(dim=0)
    return near


def shorten_pieces(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Make short histories long: cut users into pieces of so few rows, in whatever has pieces."""
    for module in pkgutil.iter_modules(triton.__path__, f"{triton.__name__}."):
        kernels = importlib.import_module(module.name)
        if hasattr(kernels, "TILE"):
            monkeypatch.setattr(kernels, "TILE", rows)


def with_queries(lengths: list[int], counts: list[int], case: Case) -> Histories:
    """Draw histories whose users have so many queries, at cuts that ascend from an empty view."""
    h = draw(lengths, case, queries=max(counts, default=1) or 1)
    own = [
        torch.arange(n) * (length + 1) // max(n, 1)
        for n, length in zip(counts, lengths, strict=True)
    ]
    return replace(
        h,
        queries=h.queries[: sum(counts)],
        query_offsets=offsets_of(counts).to(DEVICE),
        cuts=torch.cat([torch.arange(0), *own]).to(DEVICE),
    )


def only(h: Histories, user: int) -> Histories:
    """Return one user's part of a batch."""
    first, behind = h.offsets[user : user + 2].tolist()
    first_query, behind_query = h.query_offsets[user : user + 2].tolist()
    own = slice(first_query, behind_query)
    return replace(
        h,
        values=h.values[first:behind],
        offsets=h.offsets[user : user + 2] - first,
        queries=h.queries[own],
        query_offsets=h.query_offsets[user : user + 2] - first_query,
        cuts=h.cuts[own],
    )


def of_user(h: Histories, user: int, results: list[Tensor]) -> list[Tensor]:
    """Return one user's part of the result and gradient of an operator on behaviours."""
    result, grad = results
    first, behind = h.offsets[user : user + 2].tolist()
    if result.dim() > 2:
        return [result[user : user + 1], grad[first:behind]]
    first_query, behind_query = h.query_offsets[user : user + 2].tolist()
    return [result[first_query:behind_query], grad[first:behind]]


def encode(h: Histories, tau: int, impl: Impl) -> list[Tensor]:
    """Return the table and the gradient of the behaviours."""
    return with_gradient(
        lambda values: sdim.encode(values, h.offsets, h.planes, tau, impl=impl, **h.keywords),
        h.values,
    )


def read(h: Histories, tau: int, impl: Impl) -> list[Tensor]:
    """Return the interests and the gradient of a float32 table of the behaviours."""
    exact = sdim.encode(h.values.double(), h.offsets, h.planes, tau, impl="reference")
    table = exact.float().to(sums_dtype(h.values.dtype))
    queries = candidates(h)
    return with_gradient(lambda table: sdim.read(table, queries, h.planes, tau, impl=impl), table)


def attend(h: Histories, tau: int, impl: Impl) -> list[Tensor]:
    """Return the interests in whole histories and the gradient of the behaviours."""
    queries = candidates(h)
    return with_gradient(
        lambda values: sdim.attend(
            values, h.offsets, queries, h.planes, tau, impl=impl, **h.keywords
        ),
        h.values,
    )


def attend_at(h: Histories, tau: int, impl: Impl, last: int | None = None) -> list[Tensor]:
    """Return the interests at cuts and the gradient of the behaviours."""
    asked = (h.queries, h.query_offsets, h.cuts)
    return with_gradient(
        lambda values: sdim.attend_at(
            values, h.offsets, *asked, h.planes, tau, last=last, impl=impl, **h.keywords
        ),
        h.values,
    )


def attend_last(h: Histories, tau: int, impl: Impl) -> list[Tensor]:
    """Return the same with a limit to the latest 20 behaviours."""
    return attend_at(h, tau, impl, last=20)


def encode_and_read(h: Histories, tau: int, impl: Impl) -> list[Tensor]:
    """Return the interests of a table that is not kept and the gradient of the behaviours."""
    queries = candidates(h)

    def interest(values: Tensor) -> Tensor:
        table = sdim.encode(values, h.offsets, h.planes, tau, impl=impl, **h.keywords)
        return sdim.read(table, queries, h.planes, tau, impl=impl)

    return with_gradient(interest, h.values)


Operator = Callable[[Histories, int, Impl], list[Tensor]]
OPERATORS: list[Operator] = [encode, read, encode_and_read, attend, attend_at, attend_last]
operators = pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)


def candidates(h: Histories) -> Tensor:
    """Return the queries as `[B, C, D]`, of users who have as many each."""
    users, (queries, size) = h.offsets.shape[0] - 1, h.queries.shape
    return h.queries.view(users, queries // max(users, 1), size)


def with_gradient(function: Callable[[Tensor], Tensor], rows: Tensor) -> list[Tensor]:
    """Return a function's result and its gradient under `upstream`."""
    leaf = rows.detach().requires_grad_()
    out = function(leaf)
    return [out.detach(), *torch.autograd.grad(out, leaf, upstream(out))]


def gradient_of(function: Callable[..., Tensor], h: Histories) -> list[Tensor]:
    """Return a function's result and its gradient by the behaviours, which it takes first."""
    return with_gradient(lambda values: function(values, h), h.values)


def upstream(out: Tensor) -> Tensor:
    """Return numbers that are the same in every dtype."""
    return _wave(out)


def same_for_users(queries: int) -> Callable[[Tensor], Tensor]:
    """Return an `upstream` that is the same for each user, who has so many queries."""

    def upstream(out: Tensor) -> Tensor:
        own = 1 if out.dim() > 2 else queries
        return _wave(out[:own]).repeat(len(out) // own, *[1] * (out.dim() - 1))

    return upstream


def _wave(out: Tensor) -> Tensor:
    wave = torch.arange(out.numel(), device=out.device).view(out.shape).cos()
    return wave.bfloat16().to(out.dtype)


def doubled(h: Histories) -> Histories:
    """Return the same history, as stored, in float64."""
    return replace(h, values=h.values.double(), queries=h.queries.double())


def error(found: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the error as a share of that of what is exact."""
    if not exact.any():
        return float(found.double().abs().sum())
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def worst_row(found: Tensor, exact: Tensor) -> float:
    """Return the largest error of a row, which a mean over thousands of rows would hide."""
    rows, wrong = exact.norm(dim=-1), (found.double() - exact).norm(dim=-1)
    if not exact.any():
        return float(wrong.sum())
    return float((wrong / (rows + rows.square().mean().sqrt())).max())


def assert_accurate(
    h: Histories, tau: int, run: Operator, found: list[Tensor] | None = None
) -> None:
    """Compare `run` by Triton, or what it found, with float64 and with the same precision."""
    exact, plain = run(doubled(h), tau, "reference"), run(h, tau, "reference")
    for x, y, z in zip(found or run(h, tau, "triton"), plain, exact, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == z.shape
        assert error(x, z) <= max(2 * error(y, z), FLOAT32_LIKE)
        assert worst_row(x, z) <= TOLERANCE[h.values.dtype]["rtol"]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    """Compare results exactly."""
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def strided(x: Tensor) -> Tensor:
    """Return the same numbers with gaps of NaN, or of what is no index, between them."""
    gap = torch.nan if x.is_floating_point() else -(2**40)
    wide = torch.full((*x.shape, 2), gap, dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    return wide[..., 0]


class Recorder(TorchDispatchMode):
    """Keeps the calls of fused operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "hashtab":
            self.calls.append((func, tree_map_only(Tensor, Tensor.detach, args)))
        return func(*args, **kwargs or {})
