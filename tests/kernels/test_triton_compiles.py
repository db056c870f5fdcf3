"""Triton kernels compile for GPUs without spills, within shared memory, and onto tensor cores."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult
from typing import Any

import pytest

from tests.kernels.launches import FAULTY, launches
from tests.kernels.triton_compile import Compiled, compiled_by, use_compiler

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

TIME_LIMIT_S = 200  # for what spills badly takes minutes
# Bytes of a thread that known kernels spill at most: to be brought to none.
SPILLED = {90: {"_walk_back": 80}}  # 8 warps of the walk spill none, slower
# Bytes of a block, by compute capability: 8.6 and 8.9 run what is compiled for 8.0 and have less.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}

Results = dict[tuple[int, str], AsyncResult[list[Compiled]]]


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Results]:
    """Compile for the tests that were asked for, in two processes and ahead of them.

    Cases of one shape, which share kernels, go to one process.
    """
    cache = str(tmp_path_factory.mktemp("triton"))
    with ExitStack() as opened:
        pools = [
            opened.enter_context(get_context("spawn").Pool(1, use_compiler, (cache,)))
            for _ in range(2)
        ]
        found, numbers = Results(), dict[tuple[int, str], int]()
        for item in request.session.items:
            if isinstance(item, pytest.Function) and item.path == request.path:
                wanted: dict[str, Any] = item.callspec.params
                capability, case = wanted["capability"], wanted["case"]
                number = numbers.setdefault((capability, case.partition("float")[2]), len(numbers))
                pool = pools[number % 2]
                found[capability, case] = pool.apply_async(compiled_by, (capability, case))
        yield found


@pytest.mark.parametrize(
    ("capability", "case"),
    [(gpu, case) for gpu in SHARED_LIMIT for case in launches(gpu) if case != FAULTY],
)
def test_what_is_launched_is_sound(capability: int, case: str, results: Results) -> None:
    kernels = results[capability, case].get(TIME_LIMIT_S)
    assert kernels, "nothing was launched"
    found = [f"{fault}: {kernel}" for kernel in kernels for fault in faults(kernel, capability)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("case", [FAULTY])
def test_faults_are_found(capability: int, case: str, results: Results) -> None:
    (kernel,) = results[capability, case].get(TIME_LIMIT_S)
    assert faults(kernel, capability) == ["spills", "64 rows of f32 on fma, not mma"]


def faults(kernel: Compiled, capability: int) -> list[str]:
    """Say what makes a kernel slow, wrong, or too large to launch."""
    found = [f"reads what is not there: {instruction}" for instruction in kernel.lost]
    allowed = SPILLED.get(capability, {}).get(kernel.kernel, 0)
    if kernel.stack + kernel.local > allowed:
        found.append("spills")
    if kernel.shared > SHARED_LIMIT[capability]:
        found.append(f"more than {SHARED_LIMIT[capability]} bytes shared")
    for dot in kernel.dots:
        grouped = capability >= 90 and kernel.warps >= 4 and dot.rows >= 64 and dot.columns >= 16
        best = "wgmma" if grouped else "mma"
        if dot.unit != best:
            found.append(f"{dot}, not {best}")
    return found
