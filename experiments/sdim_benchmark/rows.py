"""The rows of the benchmark: operators, shapes, rivals, and the work that none can avoid."""

from collections.abc import Callable, Iterable
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
    """One operator at one shape: our side by the name of an implementation, and its rivals.

    Variants are other ways to call ours, which are told beside the table.
    """

    operator: str
    shape: Shape
    ours: Callable[[Any], Side]  # each operator has names of its own
    rivals: tuple[Side, ...]
    work: Callable[[Shape, int], Work]
    plain: str | None = "reference"  # our implementation without kernels, to be timed as a rival
    variants: tuple[Side, ...] = ()

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
        arguments=lambda b: (b.values.flatten(0, 1), b.offsets, _planes(b), b.shape.tau),
        define=definitions.encode,
    )


def _read(impl: Any) -> Side:
    return Side(
        name=impl,
        function=lambda *a: sdim.read(*a, impl=impl),
        arguments=lambda b: (b.table, b.queries, _planes(b), b.shape.tau),
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
            _planes(b),
            b.shape.tau,
        ),
        define=definitions.attend_at,
    )


def _planes(b: Batch) -> torch.Tensor:
    """Return the planes in the dtype of the behaviours, which hash by one product."""
    return b.planes.to(b.values.dtype)


def _float32_planes(side: Side) -> Side:
    """Return our side with float32 planes, which hash by three products."""

    def arguments(b: Batch) -> tuple[Any, ...]:
        *rows, _, tau = side.arguments(b)
        return (*rows, b.planes, tau)

    return replace(side, name="float32 planes", arguments=arguments)


def _encode_by_id() -> Side:
    """Return `encode` of rows in another order, each user's own, by their ids."""

    def arguments(b: Batch) -> tuple[Any, ...]:
        order = torch.rand(b.shape.users, b.shape.length, device=b.values.device).argsort(1)
        return (*_encode("auto").arguments(b), (order + b.offsets[:-1, None]).flatten())

    def by_id(*a: Any) -> torch.Tensor:
        return sdim.encode(*a[:-1], ids=a[-1])

    return replace(_encode("auto"), name="by id", function=by_id, arguments=arguments)


def _latest_half() -> Side:
    """Return `attend_at` of the latest half of a history."""
    side = _attend_at("auto")

    def function(values: torch.Tensor, offsets: torch.Tensor, *asked: Any) -> torch.Tensor:
        last = values.shape[0] // (offsets.shape[0] - 1) // 2
        found = sdim.attend_at(values, offsets, *asked, last=last)
        return found.view(offsets.shape[0] - 1, -1, values.shape[1])

    def define(b: Batch) -> torch.Tensor:
        return definitions.attend_at(b, b.shape.length // 2)

    return replace(side, name="the latest half", function=function, define=define)


def _attend_at(impl: Any) -> Side:
    def arguments(b: Batch) -> tuple[Any, ...]:
        history = b.values.flatten(0, 1), b.offsets
        asked = b.queries.flatten(0, 1), b.query_offsets, b.cuts.flatten()
        return (*history, *asked, _planes(b), b.shape.tau)

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


_Compiler = Callable[..., tuple[Side, ...]]


def all_rows(compiling: bool) -> list[Row]:
    """Return every row, the most wanted first; without compiling, eager rivals alone."""

    def compiled(*sides: Side) -> tuple[Side, ...]:
        return tuple(side.compile() for side in sides) if compiling else ()

    # The same objects for both kinds of rows, so that each is measured once a shape.
    exact_at = (*compiled(rivals.FLEX), rivals.SDPA_MASKED)
    one_group = (rivals.groups_compiled(),) if compiling else ()
    return [
        *_attend_rows(compiled),
        *_attend_at_rows(one_group, exact_at),
        *_table_rows(compiled),
        *_wide_rows(compiled, one_group),
        *_exact_rows(exact_at),
    ]


def _attend_rows(compiled: _Compiler) -> Iterable[Row]:
    exact = replace(rivals.SDPA, same=False)
    sampled = (rivals.SCATTER, rivals.EINSUM, *compiled(rivals.EINSUM, rivals.ONE_PRODUCT))
    others = (exact, rivals.DIN, *compiled(rivals.DIN))
    variants = (_float32_planes(_attend("auto")),)
    yield Row("attend", ONE, _attend, (*sampled, *others), _attend_work, variants=variants)
    for shape in BROAD:
        sides = (rivals.EINSUM, *compiled(rivals.EINSUM), exact)
        yield Row("attend", shape, _attend, sides, _attend_work, variants=variants)


def _attend_at_rows(one_group: tuple[Side, ...], exact: tuple[Side, ...]) -> Iterable[Row]:
    others = tuple(replace(side, same=False) for side in exact)
    masks = (rivals.GROUPS, *one_group)
    sides, variants = (*masks, *others), (_latest_half(),)
    yield Row("attend_at", MANY, _attend_at, sides, _attend_at_work, variants=variants)
    for shape in (LONG, replace(MANY, requests=256)):
        yield Row("attend_at", shape, _attend_at, others, _attend_at_work)


def _table_rows(compiled: _Compiler) -> Iterable[Row]:
    made = (rivals.SCATTER_TABLE, rivals.ONE_HOT)
    sides, variants = (*made, *compiled(*made)), (_float32_planes(_encode("auto")), _encode_by_id())
    yield Row("encode", BROAD[0], _encode, sides, _encode_work, variants=variants)
    # Tables are drawn and not made, so that no history is needed.
    shape = Shape(users=1024, length=1, size=64, candidates=500)
    found = (rivals.GATHER, rivals.GATHER_UNITS)
    yield Row("read", shape, _read, (*found, *compiled(*found)), _read_work)


def _wide_rows(compiled: _Compiler, one_group: tuple[Side, ...]) -> Iterable[Row]:
    for tau in (5, 8):
        shape = replace(ONE, tau=tau)
        yield Row("attend", shape, _attend, compiled(rivals.EINSUM), _attend_work)
        yield Row("attend_at", replace(MANY, tau=tau), _attend_at, one_group, _attend_at_work)


def _exact_rows(exact: tuple[Side, ...]) -> Iterable[Row]:
    # Without kernels it walks users one by one on the host: once is enough of it.
    for shape, plain in zip((ONE, *BROAD), ("blocked", None, None), strict=True):
        yield Row("target_attention", shape, _target_attention, (rivals.SDPA,), _exact_work, plain)
    shapes = (MANY, LONG, replace(MANY, requests=256))
    for shape, plain in zip(shapes, ("blocked", None, None), strict=True):
        yield Row("target_attention_at", shape, _target_attention_at, exact, _exact_work, plain)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
