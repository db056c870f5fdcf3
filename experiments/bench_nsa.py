"""Train-step speed of native sparse attention: native code, the definition, and dense attention.

One step is forward and backward, from queries, keys and values to their gradients and those of the
gates, bidirectional, as a table's feature tokens are mixed. Dense attention is torch's
`scaled_dot_product_attention` of the same tensors. All sides run in turn in one process; the best
of several rounds counts, in processor time of one thread, and ratios are of one run. The floor is
the operations of seven products (two forward, five backward, scores computed again) of the scores
that the three branches need, over this machine's rate of one large matrix product. Memory is the
peak resident growth over one step in a fresh process (Linux); where the definition would take more
than a few GB it is left out.

    python experiments/bench_nsa.py [--batch 8] [--heads 4] [--kv-heads 2] [--size 32]
"""

import argparse
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.kernels import nsa

LENGTHS = (64, 156, 256, 512, 1024, 4096, 8192)
SIDES = ("native", "reference", "dense")
SIZES: dict[str, Any] = {"block": 16, "stride": 8, "select_block": 16, "n_select": 4, "window": 16}
POSITIONS = 8192  # of all sequences of a step; longer ones come in smaller batches
PAIRS = 2**27  # of positions, times heads, that the definition can hold
SECONDS = 2.0  # of rounds a side


@dataclass(frozen=True)
class Shape:
    """Sizes of the tensors of a step."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    size: int

    def floor_seconds(self, rate: float) -> float:
        """Return the time of the products alone at `rate` operations a second."""
        blocks = len(nsa.blocks(self.tokens, SIZES["block"], SIZES["stride"]))
        selected = min(self.tokens, SIZES["n_select"] * SIZES["select_block"])
        seen: int = blocks + selected + min(self.tokens, 2 * SIZES["window"] - 1)
        operations = 7 * 2 * self.batch * self.tokens * self.heads * seen * self.size
        return operations / rate

    def fits(self, side: str) -> bool:
        """Tell whether a side can run in a few GB."""
        return side != "reference" or self.batch * self.heads * self.tokens**2 <= PAIRS


@dataclass(frozen=True)
class Step:
    """Tensors of one step, leaves of autograd."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    upstream: Tensor

    @classmethod
    def draw(cls, shape: Shape) -> Self:
        """Draw standard normal tensors."""
        torch.manual_seed(0)

        def normal(heads: int, size: int) -> Tensor:
            return torch.randn(shape.batch, shape.tokens, heads, size, requires_grad=True)

        return cls(
            q=normal(shape.heads, shape.size),
            k=normal(shape.kv_heads, shape.size),
            v=normal(shape.kv_heads, shape.size),
            gates=normal(shape.heads, 3),
            upstream=normal(shape.heads, shape.size).detach(),
        )

    def run(self, side: str) -> None:
        """Compute the result and all gradients."""
        if side == "dense":
            q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
            grouped = q.shape[1] != k.shape[1]
            out = scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)
        else:
            out = nsa.native_sparse_attention(
                self.q,
                self.k,
                self.v,
                gates=self.gates,
                causal=False,
                impl="native" if side == "native" else "reference",
                **SIZES,
            )
        out.backward(self.upstream)


def best_seconds(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return each side's best of several rounds, in turn."""
    best = dict.fromkeys(sides, math.inf)
    end = time.perf_counter() + SECONDS * len(sides)
    while time.perf_counter() < end or math.inf in best.values():
        for name, run in sides.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def product_rate() -> float:
    """Return the operations a second of a large matrix product."""
    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / best_seconds({"product": lambda: a @ b})["product"]


def peak_growth(side: str, shape: Shape) -> float:
    """Return the MB by which the peak resident set grows over one step."""
    torch.set_num_threads(1)
    Step.draw(Shape(1, 16, shape.heads, shape.kv_heads, shape.size)).run(side)
    step = Step.draw(shape)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_kb("VmRSS")
    step.run(side)
    return (_status_kb("VmHWM") - before) / 1024


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def compare(shape: Shape, rate: float) -> None:
    """Print one line of the table."""
    step = Step.draw(shape)
    sides = [side for side in SIDES if shape.fits(side)]
    seconds = best_seconds({side: partial(step.run, side) for side in sides})
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        grown = {side: pool.apply(peak_growth, (side, shape)) for side in sides}

    def show(values: dict[str, float], side: str, scale: float = 1.0) -> str:
        return f"{values[side] * scale:>10,.1f}" if side in values else f"{'-':>10}"

    floor = shape.floor_seconds(rate)
    ratios = {side: seconds[side] / seconds["native"] for side in sides}
    ratios["floor"] = seconds["native"] / floor
    print(
        f"{shape.tokens:>6,}{shape.batch:>4}"
        + "".join(show(seconds, side, 1e3) for side in SIDES)
        + f"{floor * 1e3:>10,.1f}"
        + "".join(show(ratios, side) for side in ("reference", "dense", "floor"))
        + "".join(show(grown, side) for side in SIDES)
    )


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    name = models[0].split(":")[1].strip() if models else platform.processor()
    return f"{name}, 1 thread, torch {torch.__version__}, python {sys.version.split()[0]}"


def main() -> None:
    """Measure all lengths and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="heads of keys and values")
    parser.add_argument("--size", type=int, default=32, help="of a head")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    rate = product_rate()
    print(f"{_machine()}; matrix product {rate / 1e9:.0f} GFLOP/s")
    print(f"{vars(settings)}, {SIZES}, float32\n")
    names = [f"{side} {unit}" for unit in ("ms", "MB") for side in ("nsa", "ref", "dense")]
    print(
        f"{'T':>6}{'B':>4}"
        + "".join(f"{name:>10}" for name in (*names[:3], "floor ms", "ref/nsa", "dense/nsa"))
        + "".join(f"{name:>10}" for name in ("nsa/floor", *names[3:]))
    )
    for tokens in LENGTHS:
        batch = max(1, min(settings.batch, POSITIONS // tokens))
        compare(Shape(batch, tokens, settings.heads, settings.kv_heads, settings.size), rate)


if __name__ == "__main__":
    main()
