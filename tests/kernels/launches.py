"""Calls of the Triton kernels' host functions, one for each class of shapes, for compiling alone.

Tensors are on "meta": they have shapes and dtypes and no memory.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

_USERS, _ROWS, _QUERIES = 1024, 1024 * 1000, 1024 * 300


class Shape(NamedTuple):
    """What a kernel's code depends on.

    Attributes:
        dtype: of behaviours.
        size: of behaviours.
        tau: bits of a code.
        groups: codes of a behaviour.
    """

    dtype: torch.dtype
    size: int
    tau: int
    groups: int

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.size} {self.groups}x{self.tau}"

    @property
    def values(self) -> Tensor:
        """`[N, D]`."""
        return torch.empty(_ROWS, self.size, dtype=self.dtype, device="meta")

    @property
    def planes(self) -> Tensor:
        """`[D, M]`."""
        return torch.empty(self.size, self.groups * self.tau, device="meta")

    @property
    def offsets(self) -> Tensor:
        """`[B + 1]`."""
        return torch.empty(_USERS + 1, dtype=torch.int64, device="meta")

    def candidates(self, count: int) -> Tensor:
        """`[B, C, D]`."""
        return self.values.new_empty(_USERS, count, self.size)


def _codes(shape: Shape) -> None:
    from hashtab.kernels.sdim.triton import hashing

    hashing.codes(shape.values, shape.planes, shape.tau)
    hashing.pack_codes(shape.values, shape.planes, shape.tau)


def _encode(shape: Shape) -> None:
    from hashtab.kernels.sdim.triton import encode

    table, packed = encode.encode(shape.values, shape.offsets, shape.planes, shape.tau)
    encode.encode_backward(table, shape.offsets, packed, shape.dtype)


_SDIM = {"codes": _codes, "encode": _encode}
_SDIM_SHAPES = [
    Shape(torch.bfloat16, 64, 3, 16),
    Shape(torch.bfloat16, 128, 3, 16),
    Shape(torch.bfloat16, 256, 10, 64),
    Shape(torch.float16, 40, 8, 16),
    Shape(torch.float32, 64, 3, 16),
    Shape(torch.float32, 256, 8, 16),
]

LAUNCHES: dict[str, Callable[[], object]] = {
    f"{name} {shape}": partial(launch, shape)
    for name, launch in _SDIM.items()
    for shape in _SDIM_SHAPES
}
