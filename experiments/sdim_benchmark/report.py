"""Figures as lines to read and as JSON to keep."""

import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from experiments.sdim_benchmark.click_training import TrainingFigures
from experiments.sdim_benchmark.clock import LONGEST_WAIT_S, Ceilings
from experiments.sdim_benchmark.measure import PASSES, Figures, RowFigures

_SHORT = {"forward": "fwd", "backward": "bwd", "both": "both"}
_TOGETHER = ("read", "attend_at", "target_attention_at")  # whose goals are of both passes
_SLOWER = 1.05  # what "auto" may take beyond the fastest that runs without kernels


def machine(device: torch.device) -> dict[str, str]:
    """Return what the figures depend on."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": name or "cpu",
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def table(rows: Sequence[RowFigures]) -> str:
    """Return a line a pass of each row, after a line that names the columns."""
    lines = [
        f"{'row':<46} {'pass':<5}{'ours ms':>8}  {'best rival of the same, ms':<36}"
        f"{'other attention, ms':<36}{'floor':>9}{'share':>6}{'B':>7}"
    ]
    for row in rows:
        if row.ours.failure:
            lines.append(f"{_name(row):<46} ours: {row.ours.failure}")
        passes = PASSES if row.operator in _TOGETHER else PASSES[:2]
        lines += [_pass_line(row, which) for which in passes]
    return "\n".join(line.rstrip() for line in lines)


def _name(row: RowFigures) -> str:
    return f"{row.operator} {row.shape}"


def _pass_line(row: RowFigures, which: str) -> str:
    ours, floor = row.ours.ms(which), row.floors[which]
    same, other = (_against(row.best(which, kind), ours, which) for kind in (True, False))
    mine = f"{'-':>8}" if ours is None else f"{ours:>8.3f}"
    share = f"{'-':>6}" if ours is None else f"{floor.ms / ours:>6.0%}"
    extra = row.ours.extra_bytes
    kept = "" if extra is None or which != "forward" else f"{extra:>7.1f}"
    least = f"{floor.ms:>8.3f}{floor.bound[0]}"
    return f"{_name(row):<46} {_SHORT[which]:<5}{mine}  {same:<36}{other:<36}{least}{share}{kept}"


def _against(rival: Figures | None, ours: float | None, which: str) -> str:
    ms = None if rival is None else rival.ms(which)
    if rival is None or ms is None:
        return "-"
    ratio = "" if ours is None else f"{ms / ours:.2f}x"
    return f"{ms:.3f} {rival.name} {ratio}"


def notes(rows: Sequence[RowFigures]) -> list[str]:
    """Return what the table does not show: variants, wide codes, what "auto" costs, doubts."""
    about = (_variants, _wide_codes, _automatic, _slow_launches, _failures)
    return [line for lines in about for line in lines(rows)]


def _variants(rows: Sequence[RowFigures]) -> Iterable[str]:
    for row in rows:
        for figures in row.variants:
            if figures.failure is None:
                taken = f"{figures.forward_ms:.3f} / {figures.backward_ms:.3f} ms"
                yield f"{_name(row)}, ours, {figures.name}: {taken}"


def _wide_codes(rows: Sequence[RowFigures]) -> Iterable[str]:
    known = {(row.operator, row.shape): row for row in rows}
    for row in rows:
        narrow = known.get((row.operator, replace(row.shape, tau=3)))
        if row.shape.tau == 3 or narrow is None:
            continue
        times = [(which, row.ours.ms(which), narrow.ours.ms(which)) for which in PASSES]
        ratios = [f"{which} {wide / usual:.2f}" for which, wide, usual in times if wide and usual]
        yield f"{_name(row)}, over tau 3: {', '.join(ratios) or 'not timed'}"


def _automatic(rows: Sequence[RowFigures]) -> Iterable[str]:
    for row in rows:
        for which in ("forward", "backward"):
            rival = row.best(which, same=True)
            mine = None if row.automatic is None else row.automatic.ms(which)
            best = None if rival is None else rival.ms(which)
            if rival and mine and best and mine > _SLOWER * best:
                yield (
                    f"auto is slower: {_name(row)}, {which}: {mine:.3f} ms, "
                    f"{rival.name} {best:.3f} ms"
                )


def _slow_launches(rows: Sequence[RowFigures]) -> Iterable[str]:
    for row in rows:
        for f in (row.ours, *row.rivals, *row.variants):
            # On a CPU both are one time.
            if f.host_ms and f.host_ms != f.forward_ms and f.host_ms > LONGEST_WAIT_S * 1e3:
                yield f"{_name(row)}: {f.name}: some of its time is the host's, {f.host_ms:.1f} ms"


def _failures(rows: Sequence[RowFigures]) -> Iterable[str]:
    for row in rows:
        for figures in (*row.rivals, *row.variants):
            if figures.failure:
                yield f"{_name(row)}: {figures.name}: {figures.failure}"


def training_lines(found: TrainingFigures) -> list[str]:
    """Return the best of each side and their ratio."""
    shape = found.shape
    whole, each = found.best("whole"), found.best("padded")
    lines = [
        f"training step, T {shape.length:,}, D {shape.size}, {shape.requests} x "
        f"{shape.candidates} samples a user: {shape.users} whole users, {shape.samples:,} padded"
    ]
    for name in found.milliseconds:
        taken = found.milliseconds[name]
        lines.append(f"  {name:<28}{taken:>10.2f} ms{found.rate(name):>14,.0f} samples/s")
    lines += [f"  {name:<28}{why}" for name, why in found.failures.items()]
    if whole and each:
        lines.append(f"  ratio {found.rate(whole) / found.rate(each):.1f}x")
    return lines


def write(
    file: Path,
    facts: dict[str, str],
    ceilings: Ceilings,
    rows: Sequence[RowFigures],
    training: TrainingFigures | None,
) -> None:
    """Write all figures as JSON."""
    content = {
        "machine": facts,
        "ceilings": asdict(ceilings),
        "rows": [asdict(row) for row in rows],
        "training": None if training is None else asdict(training),
    }
    file.write_text(json.dumps(_finite(content), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """Replace what JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
