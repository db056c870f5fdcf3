"""Training speed of TabNSA on one thread: a step by columns and attention, memory, a whole fit.

A step is what training does with a batch: pick rows, forward, backward, clip, AdamW. "8 networks"
is one step of all of the default's networks side by side, `a network` that over 8; a batch is of
each network. Half of the columns are numbers, half categories of five levels; the paper's preset
has numbers alone, so that its tokens are the columns. The best of several rounds counts, in
processor time.

The floor is the larger of two times: the products' operations (torch's counter, and for attention
seven products of the scores that it needs) over this machine's rate of one large matrix product,
and the bytes that autograd keeps from forward to backward, written once and read once, over its
rate of copying. Memory is the peak resident growth over network, optimiser and steps, in a fresh
process each (Linux). The whole fit is `TabNSAClassifier(n_jobs=1)` on credit-g, wall time beside
processor time; its floor is that of its training steps, validation left out.

Steps of many megabytes are slower than need be where glibc gives memory back after each: compare
with MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 in the environment.

    python experiments/bench_tabular_training.py --data FOLDER [--parts steps wide fit]
"""

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from experiments.tabular_benchmark.data import load
from hashtab.models.tabular import PAPER, TabNSAClassifier
from hashtab.models.tabular.blocks import TabMixer
from hashtab.models.tabular.embedding import Encoded
from hashtab.models.tabular.losses import CrossEntropy
from hashtab.models.tabular.network import TabNSANetwork
from hashtab.models.tabular.order import correlation_order
from hashtab.models.tabular.settings import NetworkSettings, SizedSettings, TrainingSettings
from hashtab.models.tabular.training import Fold, Sample, Trainer

ROWS = 256
LEVELS = 5
SECONDS = 1.5  # of rounds a case
ROUNDS = 3  # at least


@dataclass(frozen=True)
class Case:
    """One network setting at one size.

    Args:
        kind: "none", "dense", "sparse" or "paper".
        columns: of the table.
        networks: side by side.
        batch: rows of each network.
    """

    kind: str
    columns: int
    networks: int
    batch: int

    @property
    def numeric(self) -> int:
        return self.columns if self.kind == "paper" else self.columns // 2

    @property
    def settings(self) -> SizedSettings:
        if self.kind != "paper":
            return NetworkSettings(attention=self.kind).sized(ROWS)  # type: ignore[arg-type]
        names = NetworkSettings.__dataclass_fields__
        return NetworkSettings(**{k: v for k, v in PAPER.items() if k in names}).sized(ROWS)

    def attention_operations(self) -> float:
        """Return operations of seven products of the scores that attention needs."""
        settings = self.settings
        if settings.attention not in ("dense", "sparse"):
            return 0.0
        seen = self.columns
        if settings.attention == "sparse":
            seen = math.ceil(self.columns / settings.block)
            seen += min(self.columns, settings.selected * settings.block)
            seen += min(self.columns, 2 * settings.window - 1)
        tokens = self.networks * self.batch * self.columns
        return 7 * 2.0 * tokens * seen * settings.width


class Step:
    """One step of training, ready to run."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        rows = Encoded(
            torch.randn(1, case.numeric, ROWS),
            torch.rand(1, case.numeric, ROWS) * 8,
            torch.zeros(1, case.numeric, ROWS, dtype=torch.bool),
            torch.randint(LEVELS + 2, (1, case.columns - case.numeric, ROWS)),
        )
        levels = (LEVELS,) * (case.columns - case.numeric)
        network = TabNSANetwork(case.networks, case.numeric, levels, 2, case.settings)
        sample = Sample(rows, torch.randint(2, (ROWS,)), torch.ones(ROWS))
        folds = [Fold(np.arange(ROWS), np.arange(ROWS))] * case.networks
        training = TrainingSettings(folds=case.networks, batch_size=case.batch)
        self._trainer = Trainer(
            network, CrossEntropy(2), sample, sample, folds, training, 0, lambda _: None
        )
        self._batch = torch.randint(ROWS, (case.networks, case.batch))
        network.train()

    def forward(self) -> Tensor:
        """Return the loss of a batch, as in `Trainer`."""
        trainer = self._trainer
        answers = trainer.network(trainer.sample.rows.take(self._batch))
        target = trainer.sample.target[self._batch][:, None]
        return trainer.loss.of_answers(answers, target).mean((1, 2)).sum()

    def run(self) -> None:
        """Run one step."""
        self.forward().backward()
        self._trainer.optimizer.step()

    def products(self) -> int:
        """Return the operations of a step's products but attention's, as torch counts them."""
        for module in self._trainer.network.modules():
            if isinstance(module, TabMixer):
                module.impl = "reference"  # torch sees into no operator
        with FlopCounterMode(display=False) as counter:
            self.run()
        counts = counter.get_flop_counts().get("Global", {})
        return sum(count for name, count in counts.items() if "attention" not in str(name))


@dataclass(frozen=True)
class Machine:
    """What the machine can do: operations and copied bytes (read and written) a second."""

    operations: float
    bytes: float

    @classmethod
    def measure(cls) -> "Machine":
        """Multiply 1024 x 1024 matrices, and copy 64 MB."""
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        big, into = torch.ones(2**24), torch.ones(2**24)
        product = best_seconds(lambda: a @ b)
        return cls(2 * 1024**3 / product, 2 * 4 * 2**24 / best_seconds(lambda: into.copy_(big)))

    def floor(self, case: Case) -> tuple[float, str]:
        """Return the least seconds of a step, and which of the two bounds it."""
        moved = 2 * saved_bytes(Step(case)) / self.bytes
        operations = Step(case).products() + case.attention_operations()
        compute = operations / self.operations
        return max(compute, moved), "products" if compute > moved else "bytes"


def saved_bytes(step: Step) -> int:
    """Return the bytes that autograd keeps from forward to backward, each storage once."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step.forward()
    return sum(kept.values())


def best_seconds(run: Callable[[], object]) -> float:
    """Return the best of several rounds, in processor time."""
    run()
    best, rounds, end = math.inf, 0, time.perf_counter() + SECONDS
    while rounds < ROUNDS or time.perf_counter() < end:
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
        rounds += 1
    return best


def peak_growth(case: Case) -> float:
    """Return the MB by which the peak resident set grows over making and running two steps."""
    torch.set_num_threads(1)
    Step(Case(case.kind, 20, 1, 4)).run()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_kb("VmRSS")
    step = Step(case)
    step.run()
    step.run()
    return (_status_kb("VmHWM") - before) / 1024


def order_growth(columns: int) -> tuple[float, float]:
    """Return seconds and MB of what a fit with sparse attention orders its columns by."""
    torch.set_num_threads(1)
    rows = torch.randn(1, columns, 512)
    some = Encoded(rows, rows, rows > 9, torch.zeros(1, 0, 512, dtype=torch.int64))
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _status_kb("VmRSS"), time.process_time()
    correlation_order(some)
    return time.process_time() - start, (_status_kb("VmHWM") - before) / 1024


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def _fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def print_steps(machine: Machine) -> None:
    """Steps of a batch of 96 at narrow tables' widths."""
    print("\n(a) one step, batch 96 a network")
    print(f"{'attention':<10}{'columns':>8}{'networks':>9}{'ms':>9}{'a network':>11}", end="")
    print(f"{'floor ms':>10}{'ratio':>7}  bound by")
    for kind in ("none", "dense", "sparse", "paper"):
        for columns in (16, 61, 156):
            for networks in (1,) if kind == "paper" else (1, 8):
                case = Case(kind, columns, networks, 96)
                ms = best_seconds(Step(case).run) * 1e3
                floor, bound = machine.floor(case)
                print(
                    f"{kind:<10}{columns:>8}{networks:>9}{ms:>9.1f}{ms / networks:>11.1f}"
                    f"{floor * 1e3:>10.1f}{ms / floor / 1e3:>7.1f}  {bound}",
                    flush=True,
                )


def print_wide(machine: Machine) -> None:
    """Steps of a batch of 8 at wide tables' widths, and whether time and memory are linear."""
    print("\n(b) one step, batch 8 a network; x: of the row above, which has half of the columns")
    print(
        f"{'attention':<10}{'networks':>8}{'columns':>9}{'ms':>9}{'x':>6}{'MB':>8}{'x':>6}", end=""
    )
    print(f"{'floor ms':>10}{'ratio':>7}")
    for kind in ("none", "sparse"):
        for networks in (1, 8):
            before = (math.nan, math.nan)
            for columns in (1024, 2048, 4096, 8192):
                case = Case(kind, columns, networks, 8)
                now = (best_seconds(Step(case).run) * 1e3, _fresh(peak_growth, case))
                times, memory = (a / b for a, b in zip(now, before, strict=True))
                floor = machine.floor(case)[0] * 1e3
                print(
                    f"{kind:<10}{networks:>8}{columns:>9,}{now[0]:>9.1f}{times:>6.2f}"
                    f"{now[1]:>8.0f}{memory:>6.2f}{floor:>10.1f}{now[0] / floor:>7.1f}",
                    flush=True,
                )
                before = now
    for columns in (1024, 8192):
        seconds, mb = _fresh(order_growth, columns)
        print(f"order of {columns:,} columns, once a sparse fit: {seconds:.2f} s, {mb:.0f} MB")


def print_fit(machine: Machine, data: Path) -> None:
    """Whole fits of the defaults on credit-g."""
    table = load(data, "credit-g")
    print(f"\n(c) default fit on credit-g, {len(table.target):,} rows, n_jobs=1")
    rows, columns = table.features.shape
    trained_rows = rows - rows // 8
    batch = TrainingSettings().batch(trained_rows)
    steps = math.ceil(trained_rows / batch)
    floor_of_step, _ = machine.floor(Case("none", columns, 8, batch))
    for seed in range(3):
        estimator = TabNSAClassifier(random_state=seed, device="cpu", n_jobs=1)
        wall, process = time.perf_counter(), time.process_time()
        estimator.fit(table.features, table.target)
        wall, process = time.perf_counter() - wall, time.process_time() - process
        epochs = sum(epoch["networks"] for epoch in estimator.history_) / 8
        floor = steps * epochs * floor_of_step
        print(
            f"seed {seed}: wall {wall:.1f} s, process {process:.1f} s, {estimator.n_iter_} epochs; "
            f"floor of steps {floor:.1f} s, ratio {process / floor:.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmark's tables")
    parts = ("steps", "wide", "fit")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    machine = Machine.measure()
    print(
        f"1 thread, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} of {os.cpu_count()} "
        f"cores; matrix product {machine.operations / 1e9:.0f} GFLOP/s, copy "
        f"{machine.bytes / 1e9:.0f} GB/s"
    )
    if "steps" in settings.parts:
        print_steps(machine)
    if "wide" in settings.parts:
        print_wide(machine)
    if "fit" in settings.parts:
        print_fit(machine, settings.data)


if __name__ == "__main__":
    main()
