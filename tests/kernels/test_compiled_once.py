"""A training compiles each kernel once: batches differ in size, which no kernel is made for."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.kernels.launches import FAULTY, Batch, launches
from tests.kernels.triton_compile import use_compiler, variants

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

CASES = [case for case in launches(90) if case != FAULTY]
BATCHES = [
    Batch(),
    Batch(users=1023, rows=900_001, requests=319, candidates=499),
    Batch(users=1008, rows=900_016, requests=257, candidates=512),
]


def test_a_batch_of_another_size_compiles_nothing_anew(tmp_path: Path) -> None:
    context = get_context("spawn")
    with ProcessPoolExecutor(1, context, use_compiler, (str(tmp_path),)) as pool:
        asked = {
            case: [pool.submit(variants, 90, case, batch) for batch in BATCHES] for case in CASES
        }
        found = {case: [batch.result() for batch in of_case] for case, of_case in asked.items()}
    assert all(of_case[0] for of_case in found.values())
    assert not [case for case, (first, *others) in found.items() if any(x != first for x in others)]
