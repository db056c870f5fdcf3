"""The rows of the benchmark: operators, shapes, rivals, and the work that none can avoid."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.sdim_benchmark import definitions, rivals
from experiments.sdim_benchmark.batch import Batch, Shape, Side
from hashtab.kernels import dense, sdim

ONE = Shape(users=1024, length=1024, size=64)
MANY = Shape(users=512, length=2048, size=64, requests=64, candidates=5)
LONG = Shape(users=64, length=16384, size=64, requests=64, candidates=5)
BROAD = (
    Shape(users=256, length=4096, size=128),
    Shape(users=64, length=16384, size=128),
)


@dataclass(frozen=True)
class Work:
    """Bytes and matrix operations of both passes that no implementation can do without.

    Each tensor is read or written once; a signature takes whole 32 bit words. Operations are those
    of the hash and of adding each behaviour to G sums, or of scores, sums and their gradients.
    """

    forward_bytes: float
    backward_bytes: float
    forward_operations: float = 0
    backward_operations: float = 0


@dataclass(frozen=True)
class Row:
    """One operator at one shape: our side by the name of an implementation, and its rivals."""

    operator: str
    shape: Shape
    ours: Callable[[Any], Side]  # each operator has names of its own
    rivals: tuple[Side, ...]
    work: Callable[[Shape, int], Work]
    plain: str = "reference"  # our implementation without kernels

    @property
    def name(self) -> str:
        return f"{self.operator} {self.shape}"

    @property
    def table(self) -> bool:
        return self.operator == "read"

    def tiny(self) -> "Row":
        return replace(self, shape=self.shape.tiny())


def _encode(impl: Any) -> Side:
    return Side(
        name=impl,
        function=lambda *a: sdim.encode(*a, impl=impl),
        arguments=lambda b: (b.values.flatten(0, 1), b.offsets, b.planes, b.shape.tau),
        define=definitions.encode,
    )


def _read(impl: Any) -> Side:
    return Side(
        name=impl,
        function=lambda *a: sdim.read(*a, impl=impl),
        arguments=lambda b: (b.table, b.queries, b.planes, b.shape.tau),
        define=definitions.read,
        leaves=("table",),
    )


def _attend(impl: Any) -> Side:
    return Side(
        name=impl,
        function=lambda *a: sdim.attend(*a, impl=impl),
        arguments=lambda b: (
            b.values.flatten(0, 1),
            b.offsets,
            b.queries,
            b.planes,
            b.shape.tau,
        ),
        define=definitions.attend_at,
    )


def _attend_at(impl: Any) -> Side:
    def arguments(b: Batch) -> tuple[Any, ...]:
        history = b.values.flatten(0, 1), b.offsets
        asked = b.queries.flatten(0, 1), b.query_offsets, b.cuts.flatten()
        return (*history, *asked, b.planes, b.shape.tau)

    return Side(
        name=impl,
        function=lambda *a: sdim.attend_at(*a, impl=impl).view(
            a[1].shape[0] - 1, -1, a[0].shape[1]
        ),
        arguments=arguments,
        define=definitions.attend_at,
    )


def _target_attention(impl: Any) -> Side:
    return Side(
        name=impl,
        function=lambda *a: dense.target_attention(*a, impl=impl),
        arguments=lambda b: (b.queries, b.values.flatten(0, 1), b.offsets),
        define=definitions.exact_attention_at,
        leaves=("values", "queries"),
    )


def _target_attention_at(impl: Any) -> Side:
    def arguments(b: Batch) -> tuple[Any, ...]:
        asked = b.queries.flatten(0, 1), b.query_offsets, b.cuts.flatten()
        return (*asked, b.values.flatten(0, 1), b.offsets)

    return Side(
        name=impl,
        function=lambda *a: dense.target_attention_at(*a, impl=impl).view(
            a[1].shape[0] - 1, -1, a[0].shape[1]
        ),
        arguments=arguments,
        define=definitions.exact_attention_at,
        leaves=("values", "queries"),
    )


def _code_bytes(rows: int, shape: Shape) -> int:
    return rows * -(-shape.planes // 32) * 4


def _asked(s: Shape) -> int:
    return s.users * s.queries


def _encode_work(s: Shape, item: int) -> Work:
    history, table = s.behaviours * s.size * item, s.table_rows * s.size * 4
    moved = history + table + _code_bytes(s.behaviours, s)
    return Work(moved, moved, _hash_operations(s) + _sum_operations(s), _sum_operations(s))


def _read_work(s: Shape, item: int) -> Work:
    table, results = s.table_rows * s.size * 4, _asked(s) * s.size * 4
    forward = table + _asked(s) * s.size * item + results
    return Work(forward, 2 * table + results + _code_bytes(_asked(s), s))


def _attend_work(s: Shape, item: int) -> Work:
    history, asked = s.behaviours * s.size * item, _asked(s) * s.size * item
    moved = history + _code_bytes(s.behaviours, s) + asked
    return Work(moved + asked, moved, _hash_operations(s) + _sum_operations(s), _sum_operations(s))


def _attend_at_work(s: Shape, item: int) -> Work:
    """Backward walks the history again, for the sums at each cut are not kept."""
    once = _attend_work(s, item)
    history = s.behaviours * s.size * item
    return replace(
        once,
        backward_bytes=once.backward_bytes + history,
        backward_operations=2 * once.backward_operations,
    )


def _exact_work(s: Shape, item: int) -> Work:
    history, asked = s.behaviours * s.size * item, _asked(s) * s.size * item
    seen = (s.length + 1) / 2 if s.requests > 1 else s.length
    product = 2 * _asked(s) * seen * s.size
    return Work(history + 2 * asked, 2 * history + 4 * asked, 2 * product, 5 * product)


def _hash_operations(s: Shape) -> float:
    return 2.0 * s.behaviours * s.size * s.planes


def _sum_operations(s: Shape) -> float:
    return 2.0 * s.behaviours * s.size * s.groups


def all_rows(compiling: bool) -> list[Row]:
    """Return every row, the most wanted first; without compiling, eager rivals alone."""

    def compiled(*sides: Side) -> tuple[Side, ...]:
        return tuple(side.compile() for side in sides) if compiling else ()

    def groups() -> tuple[Side, ...]:
        return (rivals.groups_compiled(),) if compiling else ()

    other = replace(rivals.SDPA, same=False)
    other_at = tuple(
        replace(side, same=False) for side in (*compiled(rivals.FLEX), rivals.SDPA_MASKED)
    )
    sampled = (rivals.SCATTER, rivals.EINSUM, *compiled(rivals.EINSUM, rivals.ROUNDED))
    broad = (rivals.EINSUM, *compiled(rivals.EINSUM), other)
    masks = (rivals.GROUPS, *groups())
    return [
        Row(
            "attend",
            ONE,
            _attend,
            (*sampled, other, rivals.DIN, *compiled(rivals.DIN)),
            _attend_work,
        ),
        *(Row("attend", shape, _attend, broad, _attend_work) for shape in BROAD),
        Row("attend_at", MANY, _attend_at, (*masks, *other_at), _attend_at_work),
        Row(
            "encode",
            BROAD[0],
            _encode,
            (
                rivals.SCATTER_TABLE,
                rivals.ONE_HOT,
                *compiled(rivals.SCATTER_TABLE, rivals.ONE_HOT),
            ),
            _encode_work,
        ),
        Row(
            "read",
            Shape(users=1024, length=1, size=64, candidates=500),
            _read,
            (rivals.GATHER, rivals.GATHER_UNITS, *compiled(rivals.GATHER, rivals.GATHER_UNITS)),
            _read_work,
        ),
        Row("attend_at", LONG, _attend_at, other_at, _attend_at_work),
        Row("attend_at", replace(MANY, requests=256), _attend_at, other_at, _attend_at_work),
        *(
            Row("attend", replace(ONE, tau=tau), _attend, compiled(rivals.EINSUM), _attend_work)
            for tau in (5, 8)
        ),
        *(
            Row("attend_at", replace(MANY, tau=tau), _attend_at, groups(), _attend_at_work)
            for tau in (5, 8)
        ),
        *(
            Row(
                "target_attention", shape, _target_attention, (rivals.SDPA,), _exact_work, "blocked"
            )
            for shape in (ONE, *BROAD)
        ),
        *(
            Row(
                "target_attention_at",
                shape,
                _target_attention_at,
                tuple(replace(side, same=True) for side in other_at),
                _exact_work,
                "blocked",
            )
            for shape in (MANY, LONG, replace(MANY, requests=256))
        ),
    ]


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
