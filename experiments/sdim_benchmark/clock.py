"""Times and peak memory of a call on one device, and the device's own ceilings."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Self

import torch
from torch import Tensor

_CACHE_BYTES = 2**28  # beyond the second-level cache of every GPU of today
_CYCLES_A_SECOND = 2e9  # of a GPU's clock, at most
LONGEST_WAIT_S = 5e-3
_LONG_CALL_S = 0.3  # once is enough


@dataclass(frozen=True)
class Time:
    """Milliseconds of one call: on the device, and until the host has launched it."""

    device_ms: float
    host_ms: float


@dataclass(frozen=True)
class Clock:
    """Measure calls on a device, the cache flushed before each.

    On a GPU a call is queued behind a wait that outlasts its launch, so that the time between its
    two events is the device's own; the host's time is told beside it. Of a call that takes longer
    than LONGEST_WAIT_S to launch, the time holds some of the host's.
    """

    device: torch.device
    seconds: float
    flush: Tensor

    @classmethod
    def on(cls, device: torch.device, seconds: float) -> Self:
        """Return a clock that repeats each call for about `seconds`."""
        size = _CACHE_BYTES if device.type == "cuda" else 1
        return cls(device, seconds, torch.empty(size, dtype=torch.int8, device=device))

    def time(self, run: Callable[[], object]) -> Time:
        """Return the median of repeated calls, the first two not counted."""
        run()
        start = time.perf_counter()
        self.synchronize()
        run()
        launched = time.perf_counter() - start
        self.synchronize()
        repeats = self._repeats(time.perf_counter() - start)
        if self.device.type == "cuda":
            return Time(self._events(run, repeats, launched), launched * 1e3)
        taken = median(_host_ms(run) for _ in range(repeats))
        return Time(taken, taken)

    def wall_ms(self, run: Callable[[], object]) -> float:
        """Return the time a call when calls follow each other, the host's part included."""
        run()
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        repeats = self._repeats(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        self.synchronize()
        return (time.perf_counter() - start) * 1e3 / repeats

    def peak_bytes(self, run: Callable[[], tuple[Tensor, ...]]) -> int | None:
        """Return the memory that a call takes at most beyond its results, None on a CPU."""
        if self.device.type != "cuda":
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        results = run()
        self.synchronize()
        grown = torch.cuda.max_memory_allocated(self.device) - before
        return grown - sum(result.nbytes for result in results)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _repeats(self, a_call: float) -> int:
        least = 3 if a_call < _LONG_CALL_S else 1
        return int(min(100, max(least, self.seconds / max(a_call, 1e-6))))

    def _events(self, run: Callable[[], object], repeats: int, launched: float) -> float:
        cycles = int(min(2 * launched, LONGEST_WAIT_S) * _CYCLES_A_SECOND)
        pairs = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            torch.cuda._sleep(cycles)
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        self.synchronize()
        return float(median(begin.elapsed_time(end) for begin, end in pairs))


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in this run: bytes a second of a copy, operations of a product."""

    bytes_a_second: float
    operations_a_second: float

    @classmethod
    def measure(cls, clock: Clock) -> Self:
        """Time a copy of 2 GB (4 GB of traffic) and a bfloat16 product of 8,192 cubed."""
        large = clock.device.type == "cuda"
        size, n = (2_000_000_000, 8192) if large else (1_000_000, 64)
        source = torch.ones(size, dtype=torch.int8, device=clock.device)
        target = torch.empty_like(source)
        copy = clock.time(lambda: target.copy_(source)).device_ms
        a, b = (torch.randn(n, n, device=clock.device).bfloat16() for _ in range(2))
        product = clock.time(lambda: a @ b).device_ms
        return cls(2 * size / copy * 1e3, 2 * n**3 / product * 1e3)


def _host_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
