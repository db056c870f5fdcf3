"""Calls of the Triton kernels' host functions, one for each class of shapes, for compiling alone.

Tensors are on "meta": they have shapes and dtypes and no memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """How much there is of what each batch has its own number of."""

    users: int = 1024
    rows: int = 1024 * 1000
    requests: int = 320
    candidates: int = 500


_batch = Batch()


@contextmanager
def batches_of(batch: Batch) -> Iterator[None]:
    """Make what is launched within of another size."""
    global _batch
    before, _batch = _batch, batch
    try:
        yield
    finally:
        _batch = before


class Shape(NamedTuple):
    """What a kernel's code depends on.

    Attributes:
        dtype: of behaviours.
        size: of behaviours.
        tau: bits of a code.
        groups: codes of a behaviour.
        planes_dtype: of planes.
    """

    dtype: torch.dtype
    size: int
    tau: int
    groups: int
    planes_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        rows = f"{_name(self.dtype)} {self.size} {self.groups}x{self.tau}"
        if self.planes_dtype == torch.float32:
            return rows
        return f"{rows}, planes of {_name(self.planes_dtype)}"

    @property
    def usual(self) -> bool:
        """Whether codes are those of the paper: gathering by id does not depend on others."""
        return self[2:] == (3, 16, torch.float32)

    @property
    def values(self) -> Tensor:
        """`[N, D]`."""
        return torch.empty(_batch.rows, self.size, dtype=self.dtype, device="meta")

    @property
    def planes(self) -> Tensor:
        """`[D, M]`."""
        shape = (self.size, self.groups * self.tau)
        return torch.empty(shape, dtype=self.planes_dtype, device="meta")

    @property
    def offsets(self) -> Tensor:
        """`[B + 1]`."""
        return torch.empty(_batch.users + 1, dtype=torch.int64, device="meta")

    @property
    def ids(self) -> Tensor:
        """`[N]`, where `values` are a table."""
        return torch.empty(_batch.rows, dtype=torch.int64, device="meta")

    def candidates(self, count: int) -> Tensor:
        """`[B, C, D]`."""
        return self.values.new_empty(_batch.users, count, self.size)

    @property
    def requests(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[Q, D]`, their offsets `[B + 1]` and cuts `[Q]`."""
        queries = self.candidates(_batch.requests).flatten(0, 1)
        return queries, self.offsets, self.offsets.new_empty(queries.shape[0])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _codes(shape: Shape) -> None:
    from hashtab.kernels.sdim.triton import hashing

    hashing.codes(shape.values, shape.planes, shape.tau)


def _encode(shape: Shape, by_id: bool = False) -> None:
    from hashtab.kernels.sdim.triton import encode

    ids = shape.ids if by_id else None
    table, packed = encode.encode(shape.values, shape.offsets, shape.planes, shape.tau, ids)
    encode.encode_backward(table, shape.offsets, packed, shape.dtype)


def _read(shape: Shape) -> None:
    from hashtab.kernels.sdim.triton import read

    table = torch.empty(_batch.users, shape.groups, 2**shape.tau, shape.size, device="meta")
    queries = shape.candidates(_batch.candidates)
    interest, packed = read.read(table, queries, shape.planes, shape.tau)
    read.read_backward(interest, table, packed)


def _attend(shape: Shape, candidates: int, by_id: bool = False) -> None:
    from hashtab.kernels.sdim.triton import attend

    ids = shape.ids if by_id else None
    queries = shape.candidates(min(candidates, 2**shape.tau))  # more are read from a table
    interest, packed, query_packed, sums = attend.attend(
        shape.values, shape.offsets, queries, shape.planes, shape.tau, True, ids
    )
    attend.attend_backward(
        interest, shape.offsets, packed, query_packed, sums, shape.groups, shape.tau
    )


def _attend_at(shape: Shape, last: int | None = None, by_id: bool = False) -> None:
    from hashtab.kernels.sdim.triton import attend_at

    ids = shape.ids if by_id else None
    queries, query_offsets, cuts = shape.requests
    history = (shape.values, shape.offsets)
    asked = (query_offsets, cuts)
    interest, packed, query_packed = attend_at.attend_at(
        *history, queries, *asked, shape.planes, shape.tau, last, ids
    )
    attend_at.attend_at_backward(
        interest, *history, packed, query_packed, *asked, shape.groups, shape.tau, last, ids
    )


def _sum_by_item(shape: Shape) -> None:
    from hashtab.kernels.sdim.triton import items

    items.sum_by_item(shape.values, shape.ids, 1000)


def _dense(shape: Shape) -> None:
    from hashtab.kernels.dense import triton as dense

    queries = shape.candidates(1).flatten(0, 1)
    rest = (queries, None, None, None, shape.values, shape.offsets, 0.1, None)
    interest, log_sums = dense.attend_at(*rest)
    dense.attend_at_backward(interest, interest, log_sums, *rest)


def _dense_at(shape: Shape, keys: bool = False) -> None:
    from hashtab.kernels.dense import triton as dense

    asked, own = shape.requests, shape.values if keys else None
    rest = (*asked, own, shape.values, shape.offsets, 0.1, None)
    interest, log_sums = dense.attend_at(*rest)
    dense.attend_at_backward(interest, interest, log_sums, *rest)


SDIM: dict[str, Callable[[Shape], object]] = {
    "codes": _codes,
    "encode": _encode,
    "read": _read,
    "attend to 1": partial(_attend, candidates=1),
    "attend to many": partial(_attend, candidates=100),
    "attend_at": _attend_at,
    "attend_at the last": partial(_attend_at, last=2000),
}
_WITHOUT_CODES: dict[str, Callable[[Shape], object]] = {
    "sums by item": _sum_by_item,
    "dense": _dense,
    "dense at cuts": _dense_at,
    "dense at cuts, with keys": partial(_dense_at, keys=True),
}
_BY_ID: dict[str, Callable[[Shape], object]] = {
    "encode by id": partial(_encode, by_id=True),
    "attend by id to 1": partial(_attend, candidates=1, by_id=True),
    "attend by id to many": partial(_attend, candidates=100, by_id=True),
    "attend_at by id": partial(_attend_at, by_id=True),
}
_SHAPES = {  # by compute capability; few, for a kernel takes a second
    80: [
        Shape(torch.bfloat16, 64, 3, 16),
        Shape(torch.bfloat16, 256, 3, 16),
        Shape(torch.float32, 128, 3, 16),
    ],
    90: [
        Shape(torch.bfloat16, 64, 3, 16),
        Shape(torch.bfloat16, 64, 3, 16, planes_dtype=torch.bfloat16),
        Shape(torch.bfloat16, 64, 5, 16),
        Shape(torch.bfloat16, 64, 8, 16, planes_dtype=torch.bfloat16),
        Shape(torch.bfloat16, 128, 3, 16),
        Shape(torch.float16, 40, 8, 16),
        Shape(torch.float16, 40, 3, 8),
        Shape(torch.float32, 64, 3, 16),
        Shape(torch.float32, 128, 3, 16),
        Shape(torch.float32, 256, 10, 64),
        Shape(torch.bfloat16, 16, 1, 1),
        Shape(torch.bfloat16, 128, 1, 32),
        Shape(torch.float32, 8, 2, 32),
    ],
}
# What spilled, or was faulty, where all else was sound.
_ALONE = {
    80: [("encode", Shape(torch.bfloat16, 128, 1, 64))],
    90: [
        ("encode", Shape(torch.bfloat16, 128, 2, 64, torch.bfloat16)),
        ("read", Shape(torch.bfloat16, 64, 2, 24)),
        ("attend_at", Shape(torch.bfloat16, 64, 2, 24)),
        ("attend_at the last", Shape(torch.bfloat16, 64, 2, 24)),
        ("attend_at the last", Shape(torch.bfloat16, 32, 1, 32)),
        ("attend to 1", Shape(torch.bfloat16, 256, 1, 64)),
        ("attend to many", Shape(torch.bfloat16, 256, 1, 64)),
    ],
}
FAULTY = "greedy"


def _greedy() -> None:
    from tests.kernels import greedy

    greedy.launch()


def launches(capability: int) -> dict[str, Callable[[], object]]:
    """Return what to launch on GPUs of a compute capability, by name."""
    found: dict[str, Callable[[], object]] = {FAULTY: _greedy}
    rows = set()
    for shape in _SHAPES[capability]:
        operators = {**SDIM, **(_BY_ID if shape.usual else {})}
        if shape[:2] not in rows:
            operators |= _WITHOUT_CODES
        rows.add(shape[:2])
        found |= {f"{name} {shape}": partial(launch, shape) for name, launch in operators.items()}
    for name, shape in _ALONE[capability]:
        found[f"{name} {shape}"] = partial(SDIM[name], shape)
    return found
