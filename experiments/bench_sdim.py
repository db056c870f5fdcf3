"""Hash-sampled and exact attention on a GPU: our kernels, their rivals and the device's ceilings.

Each row times one operator at one shape, forward and backward, and in the same run every rival:
the usual scatter form, masked products, compiled PyTorch, `scaled_dot_product_attention`,
compiled `flex_attention`, DIN's activation unit. All times are the device's, with its cache
flushed; each side is first checked against a float64 definition, and what is wrong or fails is
told and not timed. Backward is that of a graph made before. What a mask needs is made before the
time is taken. A floor is the larger of the bytes that must be moved over the bandwidth of a copy
(`b`) and the operations over the rate of a matrix product (`o`), both measured in the same run;
`share` is the floor over our time, `B` the peak memory beyond inputs, result and gradients, in
bytes a behaviour (of `read`, a candidate). Compiled rivals keep no donated buffers, for their
graphs run more than once.

    python experiments/bench_sdim.py [--rows attend,training] [--quick] [--json FILE]
    python experiments/bench_sdim.py --device cpu --tiny     # no figures: that all of it runs
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self, get_args

import torch
import torch._functorch.config as functorch_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.sdim_benchmark import report
from experiments.sdim_benchmark.click_training import StepShape, TrainingFigures, training
from experiments.sdim_benchmark.clock import Ceilings, Clock
from experiments.sdim_benchmark.measure import Bench, RowFigures, reason
from experiments.sdim_benchmark.rows import DTYPES, Row, all_rows
from hashtab.kernels.sdim.api import Impl

ROWS = (
    "attend",
    "encode",
    "read",
    "attend_at",
    "target_attention",
    "target_attention_at",
    "training",
)


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long."""

    rows: tuple[str, ...]
    impl: str
    dtype: torch.dtype
    device: torch.device
    tiny: bool
    compiling: bool
    repeat_s: float
    limit_s: float
    json: Path | None

    @classmethod
    def parse(cls, arguments: list[str] | None = None) -> Self:
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--rows", default=",".join(ROWS), help="operators, with commas")
        impls = get_args(Impl)
        parser.add_argument("--impl", choices=impls, help="of ours; triton on a GPU, else auto")
        parser.add_argument("--dtype", choices=DTYPES, default="bf16")
        parser.add_argument("--device", default="cuda", help="cpu takes minutes for a row")
        parser.add_argument("--tiny", action="store_true", help="small shapes, to try the program")
        parser.add_argument("--eager", action="store_true", help="no compiled rivals")
        parser.add_argument("--quick", action="store_true", help="few repetitions")
        parser.add_argument("--limit-s", type=float, default=340, help="no rival begins after it")
        parser.add_argument("--json", type=Path, help="file of all figures")
        given = parser.parse_args(arguments)
        rows = tuple(given.rows.split(","))
        if unknown := set(rows) - set(ROWS):
            parser.error(f"--rows must be of {ROWS}, got {sorted(unknown)}")
        device = torch.device(given.device)
        on_gpu = device.type == "cuda"
        if on_gpu and not torch.cuda.is_available():
            parser.error("this Python's torch sees no GPU; to try the program, --device cpu --tiny")
        return cls(
            rows=rows,
            impl=given.impl or ("triton" if on_gpu else "auto"),
            dtype=DTYPES[given.dtype],
            device=device,
            tiny=given.tiny,
            compiling=on_gpu and not given.eager,
            repeat_s=0.02 if given.quick or given.tiny else 0.1,
            limit_s=given.limit_s,
            json=given.json,
        )

    def chosen(self) -> list[Row]:
        """Return the rows of the operators asked for, each shape once."""
        rows = [row for row in all_rows(self.compiling) if row.operator in self.rows]
        if self.tiny:
            rows = [row.tiny() for row in rows]
        return list({row.name: row for row in reversed(rows)}.values())[::-1]


def run(settings: Settings) -> tuple[list[RowFigures], TrainingFigures | None]:
    """Measure the rows that were asked for, and print them."""
    # Graphs are run more than once, which buffers given to the first run would not outlive.
    functorch_config.donated_buffer = False
    begun = time.monotonic()
    facts = report.machine(settings.device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    clock = Clock.on(settings.device, settings.repeat_s)
    ceilings = Ceilings.measure(clock)
    bench = Bench(clock, ceilings, settings.dtype, settings.impl, begun + settings.limit_s)
    figures: list[RowFigures] = []
    trained = None

    def keep() -> None:
        if settings.json:
            report.write(settings.json, facts, ceilings, figures, trained)

    for row in settings.chosen():
        print(row.name, flush=True)
        figures.append(bench.row(row))
        keep()
    if "training" in settings.rows:
        print("training step", flush=True)
        shape = StepShape().tiny() if settings.tiny else StepShape()
        try:
            trained = training(clock, shape, settings.dtype, settings.compiling)
        except Exception as error:  # of the device, after which the figures above still count
            print(f"  {reason(error)}")
        keep()
    _print(settings, ceilings, figures, trained)
    print(f"in {time.monotonic() - begun:.0f} s")
    return figures, trained


def _print(
    settings: Settings,
    ceilings: Ceilings,
    figures: list[RowFigures],
    trained: TrainingFigures | None,
) -> None:
    print(
        f"\n{settings.dtype}, impl {settings.impl}; "
        f"copy {ceilings.bytes_a_second / 1e12:.2f} TB/s, "
        f"bf16 product {ceilings.operations_a_second / 1e12:.0f} TFLOP/s"
    )
    print(report.table(figures))
    print("\n".join(report.notes(figures)))
    if trained:
        print("\n".join(report.training_lines(trained)))


def main() -> None:
    run(Settings.parse())


if __name__ == "__main__":
    main()
