"""Triton kernels compile for GPUs without spills, within shared memory, and onto tensor cores."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.launches import launches

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

ROOT = Path(__file__).parents[2]
TIME_LIMIT_S = 240  # of all; what spills badly takes minutes
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of a block, by compute capability

Outcomes = dict[int, dict[str, dict[str, Any]]]


def compile_all(cache: Path, capability: int) -> dict[str, dict[str, Any]]:
    """Return what `tests.kernels.triton_compile` prints in time, by case."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache / str(capability))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.triton_compile", str(capability)]
    log = cache / f"{capability}.log"
    with log.open("w") as out, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command, cwd=ROOT, env=environment, stdout=out, check=True, timeout=TIME_LIMIT_S
        )
    lines = map(json.loads, log.read_text().splitlines())
    return {line["case"]: line for line in lines}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor() as pool:
        found = pool.map(partial(compile_all, cache), SHARED_LIMIT)
        return dict(zip(SHARED_LIMIT, found, strict=True))


@pytest.mark.parametrize(
    ("capability", "case"), [(gpu, case) for gpu in SHARED_LIMIT for case in launches(gpu)]
)
def test_what_is_launched_is_sound(capability: int, case: str, outcomes: Outcomes) -> None:
    outcome = outcomes[capability].get(case)
    assert outcome is not None, f"not compiled within {TIME_LIMIT_S=}, all cases together"
    assert "error" not in outcome, outcome["error"]
    assert outcome["kernels"], "nothing was launched"
    found = [fault for kernel in outcome["kernels"] for fault in faults(kernel, capability)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_faults_are_found(capability: int, outcomes: Outcomes) -> None:
    (kernel,) = outcomes[capability]["greedy"]["kernels"]
    spilled, product = faults(kernel, capability)
    assert spilled.endswith("bytes of a thread are spilled")
    assert product == "_greedy: f32 products of 64 rows are on fma, not mma"


def faults(kernel: dict[str, Any], capability: int) -> list[str]:
    """Say what makes a kernel slow, or too large to launch."""
    found = []
    name, spilled, shared = kernel["kernel"], kernel["stack"] + kernel["local"], kernel["shared"]
    if spilled:
        found.append(f"{name}: {spilled} bytes of a thread are spilled")
    if shared > SHARED_LIMIT[capability]:
        found.append(f"{name}: {shared} bytes of shared memory, {SHARED_LIMIT[capability]=}")
    for dot in kernel["dots"]:
        unit, operand, rows = dot["unit"], dot["operand"], dot["rows"]
        best = "wgmma" if capability >= 90 and kernel["warps"] >= 4 and rows >= 64 else "mma"
        if unit != best:
            found.append(f"{name}: {operand} products of {rows} rows are on {unit}, not {best}")
    return found
