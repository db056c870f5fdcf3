"""The benchmark of hash-sampled attention, tiny on a CPU: it runs, and refuses what is wrong."""

import json
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.bench_sdim import ROWS, Settings, run
from experiments.sdim_benchmark import click_training, definitions, report, rivals
from experiments.sdim_benchmark.batch import Batch, Side
from experiments.sdim_benchmark.click_training import StepShape
from experiments.sdim_benchmark.clock import Ceilings, Clock
from experiments.sdim_benchmark.measure import PASSES, Bench
from experiments.sdim_benchmark.rows import MANY, ONE, Row, all_rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench() -> Bench:
    clock = Clock.on(CPU, 1e-3)
    return Bench(clock, Ceilings(1e9, 1e9), torch.bfloat16, "auto", time.monotonic() + 60)


def test_every_row_is_right_and_timed(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    rows, trained = run(Settings.parse(["--device=cpu", "--tiny", f"--json={file}"]))
    assert {row.operator for row in rows} == set(ROWS) - {"training"}
    found = [f for row in rows for f in (row.ours, *row.rivals, *row.variants)]
    assert not [f for f in found if f.failure]
    assert {"float32 planes", "by id", "the latest half"} <= {f.name for f in found}
    assert all(row.ours.ms(which) for row in rows for which in PASSES)
    assert trained is not None
    assert not trained.failures
    written = json.loads(file.read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert len(written["rows"]) == len(rows)
    assert set(written["training"]["milliseconds"]) == {"whole users", "padded samples"}


@pytest.mark.parametrize("wrong", ["--rows=attend,atend", "--impl=fastest", "--device=cuda"])
def test_what_cannot_run_is_refused(
    wrong: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        Settings.parse(["--device=cpu", wrong])
    asked = wrong.partition("=")[2].rpartition(",")[2]
    assert {"cuda": "no GPU"}.get(asked, asked) in capsys.readouterr().err


def attend_row(ours: Side) -> Row:
    (row,) = (r for r in all_rows(False) if r.operator == "attend" and r.shape == ONE)
    return replace(row, ours=lambda _: ours, rivals=(rivals.EINSUM,)).tiny()


def off_by(factor: float) -> Side:
    def function(values: Tensor, queries: Tensor, planes: Tensor, tau: int) -> Tensor:
        return rivals.masked_einsum(values, queries, planes, tau) * factor

    return replace(rivals.EINSUM, function=function)


def test_a_wrong_result_has_no_time_and_no_ratio(bench: Bench) -> None:
    row = attend_row(off_by(1.1))
    figures = bench.row(row)
    assert figures.ours.failure is not None
    assert figures.ours.failure.startswith("ArithmeticError: wrong")
    assert figures.best("both", same=True) is not None
    assert re.search(r"\d einsum", report.table([figures]))
    assert not re.search(r"\dx ", report.table([figures]).replace(row.name, ""))


def test_a_wrong_gradient_is_refused(bench: Bench) -> None:
    def function(values: Tensor, queries: Tensor, planes: Tensor, tau: int) -> Tensor:
        right = rivals.masked_einsum(values, queries, planes, tau)
        return right + 0.1 * (values.sum() - values.sum().detach())

    figures = bench.row(attend_row(replace(rivals.EINSUM, function=function)))
    assert "wrong" in str(figures.ours.failure)


def test_what_is_not_finite_is_refused(bench: Bench) -> None:
    assert "error inf" in str(bench.row(attend_row(off_by(torch.nan))).ours.failure)


def test_a_side_that_fails_is_told_and_others_run(bench: Bench) -> None:
    def function(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory left")

    figures = bench.row(attend_row(replace(rivals.EINSUM, function=function)))
    assert figures.ours.failure == "OutOfMemoryError: no memory left"
    assert figures.rivals[-1].failure is None


def test_no_rival_begins_when_time_is_over(bench: Bench) -> None:
    figures = replace(bench, ends=0.0).row(attend_row(off_by(1.0)))
    assert figures.ours.failure is None
    assert all("left out" in str(f.failure) for f in figures.rivals)


def test_flex_attention_masks_by_cuts() -> None:
    batch = Batch.draw(MANY.tiny(), torch.float32, CPU, table=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow unless compiled, which needs a GPU
        values, queries, mask = rivals.FLEX.arguments(batch)
        result = rivals.FLEX.function(values.detach(), queries.detach(), mask)
    expected = rivals.FLEX.define(batch.in_float64(torch.arange(3)))
    assert definitions.relative_error(result, expected) < 1e-5


def test_one_product_in_the_dtype_of_the_behaviours_moves_none() -> None:
    batch = Batch.draw(ONE.tiny(), torch.bfloat16, CPU, table=False)
    result = rivals.ONE_PRODUCT.function(*rivals.ONE_PRODUCT.arguments(batch))
    exact = definitions.attend_at(batch.in_float64(torch.arange(3)))
    assert definitions.relative_error(result, exact) < definitions.LIMITS[torch.bfloat16]


def test_whole_users_and_padded_samples_have_the_same_gradients() -> None:
    shape = StepShape().tiny()
    model = click_training.model_of(shape, torch.float32, CPU)
    whole = click_training.whole_users(shape, CPU)
    each = click_training.padded(whole, shape, torch.arange(len(whole.labels)))
    found = []
    for logits in (lambda: model(whole), lambda: click_training.padded_logits(model, each)):
        click_training.step(model, logits, whole.labels)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
