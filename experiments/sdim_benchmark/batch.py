"""Shapes that are timed, their tensors, and what a side of a comparison is.

Symbols: B users, L behaviours a user, D size, Q queries a user, M planes, tau bits a group,
G = M / tau groups, K = 2**tau buckets.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

PAIRS = 2**24  # of queries and behaviours that a definition holds at once, in float64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one row of the benchmark; all users have one length."""

    users: int
    length: int
    size: int
    requests: int = 1
    candidates: int = 1
    tau: int = 3
    groups: int = 16

    @property
    def queries(self) -> int:
        return self.requests * self.candidates

    @property
    def planes(self) -> int:
        return self.groups * self.tau

    @property
    def buckets(self) -> int:
        return 1 << self.tau

    @property
    def behaviours(self) -> int:
        return self.users * self.length

    @property
    def table_rows(self) -> int:
        return self.users * self.groups * self.buckets

    def tiny(self) -> Self:
        """Return a shape of the same kind that any machine computes at once."""
        return replace(
            self,
            users=3,
            length=min(self.length, 37),
            size=16,
            requests=min(self.requests, 3),
            candidates=min(self.candidates, 5),
        )

    def __str__(self) -> str:
        asked = f", {self.requests} x {self.candidates}" if self.queries > 1 else ""
        bits = f", tau {self.tau}" if self.tau != 3 else ""
        return f"{self.users:,} x {self.length:,} x {self.size}{asked}{bits}"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tensors of a shape; `values`, `queries` and `table` are leaves of autograd.

    Args:
        shape: the sizes.
        dtype: of behaviours and queries where they are timed.
        values: `[B, L, D]`.
        queries: `[B, Q, D]`.
        cuts: `[B, Q]` int64, ascending; all of them L where a user has one request.
        planes: `[D, M]` float32, of the digits that `dtype` has.
        table: `[B, G, K, D]` float32; None where no table is read.
    """

    shape: Shape
    dtype: torch.dtype
    values: Tensor
    queries: Tensor
    cuts: Tensor
    planes: Tensor
    table: Tensor | None = None

    @classmethod
    def draw(cls, shape: Shape, dtype: torch.dtype, device: torch.device, table: bool) -> Self:
        """Draw standard normal vectors and uniform cuts."""
        random = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=random, device=device)

        users, length, size = shape.users, shape.length, shape.size
        cuts = torch.full((users, 1), length, device=device)
        if shape.requests > 1:
            asked = (users, shape.requests)
            cuts = torch.randint(1, length + 1, asked, generator=random, device=device)
        rows = (users, shape.groups, 2**shape.tau, size)
        return cls(
            shape=shape,
            dtype=dtype,
            values=normal(users, length, size).to(dtype).requires_grad_(),
            queries=normal(users, shape.queries, size).to(dtype).requires_grad_(),
            cuts=cuts.sort(1).values.repeat_interleave(shape.candidates, dim=1),
            planes=normal(size, shape.planes).to(dtype).float(),
            table=normal(*rows).requires_grad_() if table else None,
        )

    @property
    def offsets(self) -> Tensor:
        """`[B + 1]`, of the flattened behaviours."""
        return torch.arange(self.shape.users + 1, device=self.values.device) * self.shape.length

    @property
    def query_offsets(self) -> Tensor:
        """`[B + 1]`, of the flattened queries."""
        return torch.arange(self.shape.users + 1, device=self.values.device) * self.shape.queries

    def leaf(self, name: str) -> Tensor:
        leaf: Tensor = getattr(self, name)
        return leaf

    def sampled_users(self) -> Tensor:
        """Return some users from the first to the last, as many as a definition can hold."""
        shape = self.shape
        wide = max(shape.length * shape.queries, shape.length * shape.groups * 2**shape.tau)
        n = max(1, min(shape.users, 32, PAIRS // wide))
        return torch.linspace(0, shape.users - 1, n, device=self.values.device).long()

    def in_float64(self, users: Tensor) -> Self:
        """Return these users alone, in float64 and as leaves of their own."""

        def some(x: Tensor) -> Tensor:
            return x.detach()[users].double().requires_grad_()

        return replace(
            self,
            shape=replace(self.shape, users=len(users)),
            values=some(self.values),
            queries=some(self.queries),
            cuts=self.cuts[users],
            table=None if self.table is None else some(self.table),
        )


@dataclass(frozen=True, kw_only=True)
class Side:
    """One implementation of a comparison.

    Args:
        name: as reports call it.
        function: what is timed.
        arguments: makes its arguments, before the time is taken.
        define: the float64 definition of its result for a batch of float64, user by user.
        leaves: of the batch, which have a gradient; parameters among the arguments have one too.
        same: whether it computes the same function as ours; else its time tells what another
            kind of attention would cost.
        compiled: whether `function` is compiled for one shape.
    """

    name: str
    function: Callable[..., Tensor]
    arguments: Callable[[Batch], tuple[Any, ...]]
    define: Callable[[Batch], Tensor]
    leaves: tuple[str, ...] = ("values",)
    same: bool = True
    compiled: bool = False

    def compile(self) -> Self:
        """Return this side by `torch.compile`."""
        function = torch.compile(self.function, dynamic=False)
        return replace(self, name=f"{self.name}, compiled", function=function, compiled=True)

    def differentiated(self, batch: Batch, arguments: tuple[Any, ...]) -> list[Tensor]:
        """Return what gradients are taken of, the batch's leaves first."""
        leaves = [batch.leaf(name) for name in self.leaves]
        return leaves + [x for x in arguments if isinstance(x, nn.Parameter)]
