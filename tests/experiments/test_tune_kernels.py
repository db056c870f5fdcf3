"""The search for launch shapes: what it tries, what it drops, what it keeps."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments import tune_kernels
from experiments.tune_kernels import Call, neighbours
from hashtab.kernels.core import tuning
from hashtab.kernels.core.tuning import Asked, LaunchShape

RULE = {"LENGTH": 64, "STAGES": 2, "num_warps": 4}
CASE = "kernel float32 64"


def test_neighbours_begin_with_the_rule_and_are_shapes_that_triton_takes() -> None:
    for rule in (
        RULE,
        {"LENGTH": 16, "num_warps": 8},
        {"LENGTH": 256, "STAGES": 1, "num_warps": 4},
    ):
        first, *others = neighbours(Asked(rule))
        assert first == rule
        assert others
        for shape in others:
            assert shape != rule
            assert set(shape) == set(rule)
            assert 16 <= shape["LENGTH"] <= 256
            assert shape.get("STAGES", 1) > 0


def test_neighbours_have_no_more_or_fewer_rows_than_a_kernel_allows() -> None:
    assert {shape["LENGTH"] for shape in neighbours(Asked(RULE, (64, 64)))} == {64}
    assert {shape["LENGTH"] for shape in neighbours(Asked(RULE, (64, 256)))} == {64, 128}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], LaunchShape]:
    """Return a function that asks for a launch shape as a kernel does, on a GPU without a file."""
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setattr(tuning, "gpu_name", lambda _: "NVIDIA X1")
    monkeypatch.setattr(tuning, "_tables", dict)
    tables: dict[str, Any] = {}
    monkeypatch.setattr(tuning, "_tables", lambda: tables)
    return lambda: tuning.launch_shape("kernel", torch.device("meta"), torch.float32, 64, rule=RULE)


def test_the_shape_is_kept_that_is_best_for_all_and_gives_the_same(
    asked: Callable[[], LaunchShape],
) -> None:
    def run() -> tuple[torch.Tensor, ...]:
        shape = asked()  # eight warps err, and would be the fastest
        return (torch.full((3,), 2.0 if shape["num_warps"] == 8 else 1.0),)

    def also_run() -> tuple[torch.Tensor, ...]:
        return run()

    def time(timed: Callable[[], object]) -> SimpleNamespace:
        length, stages = asked()["LENGTH"], asked().get("STAGES")
        if timed is run:  # to which a third stage would be best, and loses in the other
            return SimpleNamespace(device_ms=1 if stages == 3 else length)
        return SimpleNamespace(device_ms=110 if stages == 3 else 100)

    clock: Any = SimpleNamespace(time=time, device=torch.device("meta"))
    one, two = Call("one", run), Call("two", also_run)
    third, short = {**RULE, "STAGES": 3}, {**RULE, "LENGTH": 32}
    found = tune_kernels.best_shape([one], clock, CASE, Asked(RULE))
    assert found == {"shape": third, "share_of_rule": round(1 / 64, 3)}
    found = tune_kernels.best_shape([one, two], clock, CASE, Asked(RULE))
    assert found == {"shape": short, "share_of_rule": 0.75}
    assert tune_kernels.best_shape([two], clock, CASE, Asked(RULE)) is None
    assert asked() == RULE


def test_what_does_not_run_errs_or_spills_is_dropped() -> None:
    ones, twos = (torch.ones(3),), (torch.full((3,), 2.0),)
    assert tune_kernels._fault(None, ones, 0) == "does not run"
    assert tune_kernels._fault(twos, ones, 0) == "errs"
    assert tune_kernels._fault(ones, ones, 8) == "spills"
    assert not tune_kernels._fault(ones, ones, 0)
