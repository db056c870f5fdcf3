"""How Triton kernels are cut into tiles, stages and warps: as measured on a GPU, or by a rule.

`tuned/*.json` hold what `experiments/tune_kernels.py` measured, one file a kind of GPU. A kernel
asks for its case, which names all that its best shape depends on; for what no file has, and for
other GPUs, its own rule holds. A user's result never depends on a batch's size by this.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from hashtab.kernels.core.dispatch import interpreted

LaunchShape = dict[str, int]

FOLDER = Path(__file__).parent / "tuned"


class Asked(NamedTuple):
    """What a kernel says of a case.

    Attributes:
        rule: the shape where none was measured.
        lengths: the least and the most rows of a tile that compilers are known to get right.
    """

    rule: LaunchShape
    lengths: tuple[int, int] = (16, 256)


_asked: list[dict[str, Asked]] = []


def launch_shape(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    *sizes: int,
    rule: LaunchShape,
    lengths: tuple[int, int] = (16, 256),
) -> LaunchShape:
    """Return the launch shape of a kernel.

    Args:
        kernel: its name.
        device: where it runs.
        dtype: of the rows that it reads or writes.
        sizes: what else its best shape depends on.
        rule: the shape where none was measured.
        lengths: rows of a tile that may be measured, least and most.
    """
    if interpreted():
        return {"LENGTH": 16, "num_warps": 4} | ({"STAGES": 1} if "STAGES" in rule else {})
    case = f"{kernel} {str(dtype).removeprefix('torch.')} {' '.join(map(str, sizes))}"
    for record in _asked:
        record[case] = Asked(rule, lengths)
    return measured(gpu_name(device)).get(case, rule)


def measured(gpu: str) -> dict[str, LaunchShape]:
    """Return the shapes of the kind of GPU that a name begins with, by case; to be read alone."""
    return next((shapes for kind, shapes in _tables().items() if gpu.startswith(kind)), {})


def gpu_name(device: torch.device) -> str:
    """Return the name of a GPU, nothing for another device."""
    return _name(device.index or 0) if device.type == "cuda" else ""


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _tables() -> dict[str, dict[str, LaunchShape]]:
    files = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    return {
        file["gpu"]: {case: entry["shape"] for case, entry in file["cases"].items()}
        for file in files
    }


@contextmanager
def asked() -> Iterator[dict[str, Asked]]:
    """Collect what kernels ask for within, by case."""
    record: dict[str, Asked] = {}
    _asked.append(record)
    try:
        yield record
    finally:
        _asked.pop()  # records may be equal


@contextmanager
def trying(gpu: str, case: str, shape: LaunchShape) -> Iterator[None]:
    """Launch a case of a GPU of this name in this shape within, whatever was measured."""
    tables = _tables()
    kind = next((kind for kind in tables if gpu.startswith(kind)), gpu)
    shapes = tables.setdefault(kind, {})
    before = shapes.get(case)
    shapes[case] = shape
    try:
        yield
    finally:
        if before is None:
            del shapes[case]
        else:
            shapes[case] = before
