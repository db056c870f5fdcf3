"""One row: every side is checked against its definition, then timed; a failure is a result too."""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from experiments.sdim_benchmark.batch import Batch, Shape, Side
from experiments.sdim_benchmark.clock import Ceilings, Clock
from experiments.sdim_benchmark.definitions import LIMITS, relative_error
from experiments.sdim_benchmark.rows import Row, Work

PASSES = ("forward", "backward", "both")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was found of one side.

    Args:
        name: of the side.
        same: whether it computes what ours does.
        error: the largest relative RMS error of result and gradients.
        forward_ms: of the device, with what backward needs kept; None where it failed.
        backward_ms: of the device, of a graph made before.
        host_ms: until the host has launched the forward pass.
        extra_bytes: peak memory of both passes beyond inputs, result and gradients, a behaviour.
        failure: why there are no times.
    """

    name: str
    same: bool = True
    error: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    host_ms: float | None = None
    extra_bytes: float | None = None
    failure: str | None = None

    def ms(self, which: str) -> float | None:
        """Return the time of a pass of `PASSES`."""
        if self.forward_ms is None or self.backward_ms is None:
            return None
        each = {"forward": self.forward_ms, "backward": self.backward_ms}
        return each.get(which, sum(each.values()))


class Floor(NamedTuple):
    """The least time a pass can take, and whether bytes or matrix operations are its bound."""

    ms: float
    bound: str

    @classmethod
    def of(cls, moved: float, operations: float, ceilings: Ceilings) -> Self:
        times = {
            "bytes": moved / ceilings.bytes_a_second * 1e3,
            "operations": operations / ceilings.operations_a_second * 1e3,
        }
        bound = max(times, key=times.__getitem__)
        return cls(times[bound], bound)


@dataclass(frozen=True, kw_only=True)
class RowFigures:
    """What was found of one row.

    Args:
        operator: of the row.
        shape: of the row.
        ours: of the implementation asked for.
        rivals: of all others; of one name each.
        variants: of other ways to call ours.
        floors: of each pass of `PASSES`, at the ceilings of this run.
        automatic: of `impl="auto"`, where another one was asked for.
    """

    operator: str
    shape: Shape
    ours: Figures
    rivals: tuple[Figures, ...]
    floors: dict[str, Floor]
    automatic: Figures | None = None
    variants: tuple[Figures, ...] = ()

    def best(self, which: str, same: bool) -> Figures | None:
        """Return the fastest rival of a pass that computes what ours does, or something else."""
        timed = [f for f in self.rivals if f.same == same and f.ms(which) is not None]
        return min(timed, key=lambda f: f.ms(which) or 0.0, default=None)


@dataclass(frozen=True)
class Bench:
    """What rows are measured with.

    Args:
        clock: of the device.
        ceilings: of the device in this run.
        dtype: of behaviours and queries.
        impl: of ours.
        ends: in seconds of `time.monotonic`, no rival is begun after it.
        known: exact attention at a shape is measured once, whatever row asks for it.
    """

    clock: Clock
    ceilings: Ceilings
    dtype: torch.dtype
    impl: str
    ends: float
    known: dict[tuple[str, Callable[..., Tensor], Shape], Figures] = field(default_factory=dict)

    def row(self, row: Row) -> RowFigures:
        """Measure a row, ours first; after an error of the device itself there are no times."""
        torch.compiler.reset()
        floors = _floors(row.work(row.shape, self.dtype.itemsize), self.ceilings)
        try:
            batch = Batch.draw(row.shape, self.dtype, self.clock.device, row.table)
            sides = self._sides(row, batch)
        except Exception as error:  # of the device, beyond which nothing runs
            sides = {"ours": Figures(name=self.impl, failure=reason(error)), "rivals": ()}
        return RowFigures(operator=row.operator, shape=row.shape, floors=floors, **sides)

    def _sides(self, row: Row, batch: Batch) -> dict[str, Any]:
        ours = self.side(row.ours(self.impl), batch)
        automatic = None if self.impl == "auto" else self.side(row.ours("auto"), batch)
        plain: tuple[Side, ...] = ()
        if row.plain not in (None, self.impl):
            plain = (replace(row.ours(row.plain), name=f"our {row.plain}"),)
        found = tuple(self._rivals((*plain, *row.rivals), batch))
        variants = tuple(self._rivals(row.variants, batch))
        return {"ours": ours, "rivals": found, "automatic": automatic, "variants": variants}

    def _rivals(self, sides: Iterable[Side], batch: Batch) -> Iterable[Figures]:
        for side in sides:
            key = (side.name, side.function, batch.shape)
            if key not in self.known and time.monotonic() > self.ends:
                yield Figures(name=side.name, same=side.same, failure="left out, time is over")
                continue
            if key not in self.known:
                self.known[key] = self.side(side, batch)
            yield replace(self.known[key], same=side.same)

    def side(self, side: Side, batch: Batch) -> Figures:
        """Check and time one side; what fails is told and the run goes on."""
        begun = time.monotonic()
        try:
            figures = self._measured(side, batch)
        except Exception as error:  # whatever a rival, its compiler or the device raises
            figures = Figures(name=side.name, same=side.same, failure=reason(error))
        if self.clock.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        print(f"  {_line(figures)}   ({time.monotonic() - begun:.0f} s)", flush=True)
        return figures

    def _measured(self, side: Side, batch: Batch) -> Figures:
        if not side.compiled and batch.shape != batch.shape.tiny():
            small = Batch.draw(
                batch.shape.tiny(), batch.dtype, self.clock.device, batch.table is not None
            )
            self._refuse_wrong(Prepared.of(side, small), "at a small shape")
        prepared = Prepared.of(side, batch)
        error = self._refuse_wrong(prepared, "at this shape")
        forward = self.clock.time(prepared.forward)
        backward = self.clock.time(partial(prepared.gradients, prepared.forward()))
        extra = self.clock.peak_bytes(prepared.both)
        rows = batch.shape.behaviours if batch.table is None else batch.queries.shape[:2].numel()
        return Figures(
            name=side.name,
            same=side.same,
            error=error,
            forward_ms=forward.device_ms,
            backward_ms=backward.device_ms,
            host_ms=forward.host_ms,
            extra_bytes=None if extra is None else extra / rows,
        )

    def _refuse_wrong(self, prepared: "Prepared", where: str) -> float:
        error, limit = prepared.error(), LIMITS[self.dtype]
        if not error <= limit:
            raise ArithmeticError(f"wrong {where}: relative error {error:.2g}, limit {limit:.2g}")
        return error


@dataclass(frozen=True)
class Prepared:
    """A side with its arguments made and a fixed gradient of its result."""

    side: Side
    batch: Batch
    arguments: tuple[object, ...]
    upstream: Tensor

    @classmethod
    def of(cls, side: Side, batch: Batch) -> "Prepared":
        arguments = side.arguments(batch)
        random = torch.Generator(batch.values.device).manual_seed(2)
        result = side.function(*arguments).detach()
        upstream = torch.randn(result.shape, generator=random, device=result.device)
        return cls(side, batch, arguments, upstream.to(result.dtype))

    def forward(self) -> Tensor:
        return self.side.function(*self.arguments)

    def gradients(self, result: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients; the graph stays for the next call."""
        wanted = self.side.differentiated(self.batch, self.arguments)
        return torch.autograd.grad(result, wanted, self.upstream, retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        result = self.forward()
        return (result.detach(), *self.gradients(result))

    def error(self) -> float:
        """Return the largest relative error of result and gradients, of some users.

        All that is computed must be finite.
        """
        computed = self.both()[: 1 + len(self.side.leaves)]
        if not all(bool(x.isfinite().all()) for x in computed):
            return torch.inf
        users = self.batch.sampled_users()
        small = self.batch.in_float64(users)
        leaves = [small.leaf(name) for name in self.side.leaves]
        defined = self.side.define(small)
        gradients = torch.autograd.grad(defined, leaves, self.upstream[users].double())
        wanted = (defined.detach(), *gradients)
        return max(relative_error(x[users], y) for x, y in zip(computed, wanted, strict=True))


def reason(error: Exception) -> str:
    """Return an error in one short line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:100]}"


def _floors(work: Work, ceilings: Ceilings) -> dict[str, Floor]:
    forward = Floor.of(work.forward_bytes, work.forward_operations, ceilings)
    backward = Floor.of(work.backward_bytes, work.backward_operations, ceilings)
    larger = max(forward, backward, key=lambda floor: floor.ms)
    both = Floor(forward.ms + backward.ms, larger.bound)
    return {"forward": forward, "backward": backward, "both": both}


def _line(f: Figures) -> str:
    if f.failure or f.forward_ms is None or f.backward_ms is None:
        return f"{f.name:<28} {f.failure}"
    extra = "" if f.extra_bytes is None else f"   {f.extra_bytes:,.1f} B a behaviour"
    return (
        f"{f.name:<28} forward {f.forward_ms:8.3f}   backward {f.backward_ms:8.3f} ms   "
        f"launched in {f.host_ms:.2f} ms   error {f.error:.1e}{extra}"
    )
