"""The search for launch shapes: what it tries, what it drops, what it keeps."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments import tune_kernels
from experiments.tune_kernels import Call, neighbours
from hashtab.kernels.core import tuning
from hashtab.kernels.core.tuning import LaunchShape

RULE = {"LENGTH": 64, "STAGES": 2, "num_warps": 4}
CASE = "kernel float32 64"


def test_neighbours_begin_with_the_rule_and_are_shapes_that_triton_takes() -> None:
    for rule in (
        RULE,
        {"LENGTH": 16, "num_warps": 8},
        {"LENGTH": 256, "STAGES": 1, "num_warps": 4},
    ):
        first, *others = neighbours(rule)
        assert first == rule
        assert others
        for shape in others:
            assert shape != rule
            assert set(shape) == set(rule)
            assert 16 <= shape["LENGTH"] <= 256
            assert shape.get("STAGES", 1) > 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], LaunchShape]:
    """Return a function that asks for a launch shape as a kernel does, on a GPU without a file."""
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setattr(tuning, "gpu_name", lambda _: "NVIDIA X1")
    monkeypatch.setattr(tuning, "_tables", dict)
    tables: dict[str, Any] = {}
    monkeypatch.setattr(tuning, "_tables", lambda: tables)
    return lambda: tuning.launch_shape("kernel", torch.device("meta"), torch.float32, 64, rule=RULE)


def test_the_fastest_shape_that_gives_the_same_is_kept(asked: Callable[[], LaunchShape]) -> None:
    def run() -> tuple[torch.Tensor, ...]:
        shape = asked()  # eight warps err, and would be the fastest
        return (torch.full((3,), 2.0 if shape["num_warps"] == 8 else 1.0),)

    def time(run: Callable[[], object]) -> SimpleNamespace:
        shape = asked()
        return SimpleNamespace(device_ms=shape["LENGTH"] / shape["num_warps"])

    best: dict[str, Any] = {}
    clock: Any = SimpleNamespace(time=time)
    tune_kernels._tune_case(Call("call", run), clock, "NVIDIA X1", CASE, RULE, best)
    assert best == {CASE: {"shape": {**RULE, "LENGTH": 32}, "ms": 8.0, "rule_ms": 16.0}}
    assert asked() == RULE
