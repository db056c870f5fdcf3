"""Launch shapes: what was measured on a GPU is taken there, and a rule everywhere else."""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from experiments.tune_kernels import CASES
from hashtab.kernels.core import tuning
from hashtab.kernels.core.tuning import Asked
from tests.kernels.launches import Shape
from tests.kernels.triton_compile import asked_for, use_compiler

RULE = {"LENGTH": 64, "STAGES": 3, "num_warps": 4}
DEVICE = torch.device("meta")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Pass for a GPU of which one case was measured."""
    cases = {"encode bfloat16 64 128": {"shape": {**RULE, "num_warps": 8}, "share_of_rule": 0.5}}
    (tmp_path / "some.json").write_text(json.dumps({"gpu": "NVIDIA X1", "cases": cases}))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setattr(tuning, "gpu_name", lambda _: "NVIDIA X1 80GB")
    tuning._tables.cache_clear()
    yield "NVIDIA X1 80GB"
    tuning._tables.cache_clear()


def asked(*sizes: int) -> dict[str, int]:
    return tuning.launch_shape("encode", DEVICE, torch.bfloat16, *sizes, rule=RULE)


def test_what_was_measured_is_taken_and_the_rule_for_all_else(
    gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(64, 128)["num_warps"] == 8
    assert asked(64, 64) == RULE
    monkeypatch.setattr(tuning, "gpu_name", lambda _: "NVIDIA Y")
    assert asked(64, 128) == RULE


def test_a_shape_is_tried_for_a_while(gpu: str) -> None:
    for case, sizes in (("encode bfloat16 64 128", (64, 128)), ("encode bfloat16 32 8", (32, 8))):
        before = asked(*sizes)
        with tuning.trying(gpu, case, {**RULE, "LENGTH": 32}), tuning.asked() as record:
            assert asked(*sizes)["LENGTH"] == 32
        assert record == {case: Asked(RULE)}
        assert asked(*sizes) == before


def test_each_who_asks_hears_what_kernels_ask_for_within(gpu: str) -> None:
    with tuning.asked() as outer:
        with tuning.asked() as inner:
            pass
        asked(64)
    assert inner == {}
    assert outer == {"encode bfloat16 64": Asked(RULE)}


def test_files_hold_what_kernels_ask_for(tmp_path: Path) -> None:
    shapes = [Shape(c.dtype, c.size, c.tau, c.groups, c.planes_dtype) for c in CASES]
    context = get_context("spawn")
    with ProcessPoolExecutor(1, context, use_compiler, (str(tmp_path),)) as pool:
        asked = pool.submit(asked_for, 90, shapes).result()
    for path in tuning.FOLDER.glob("*.json"):
        file = json.loads(path.read_text())
        assert file["gpu"] in file["measured_on"]
        for case, entry in file["cases"].items():
            rule, (least, most) = asked[case]
            assert entry["shape"] != rule
            assert entry["shape"].keys() == rule.keys()
            assert least <= entry["shape"]["LENGTH"] <= most
