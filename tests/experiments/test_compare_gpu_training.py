"""The comparison of trainings, small on a CPU: stored batches are the loader's, sides are alike."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import compare_gpu_training as compare
from hashtab.features.dataset import Dataset
from hashtab.models.ctr import TensorBatch
from hashtab.pipelines.training import seed_of
from tests.pipelines.conftest import likes

__all__ = ["likes"]  # a fixture that lives in another file

CPU = torch.device("cpu")
SMALL = ["--planes=12", "--tau=3", "--history-limit=0", "--device=cpu"]


@pytest.fixture(scope="module")
def file(likes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("epoch") / "epoch.npz"
    compare.prepare(likes, file, samples_per_batch=128)
    return file


def loaded(likes: Path, split: str, seed: int | None) -> list[TensorBatch]:
    batches = Dataset.open(likes).batches(split, 128, 2000, shuffle_seed=seed)
    return [TensorBatch.from_numpy(batch) for batch in batches]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_stored_batches_are_those_that_training_takes(split: str, file: Path, likes: Path) -> None:
    stored = compare.Epoch.read(file).batches(split)
    expected = loaded(likes, split, seed_of(0, 0) if split == "train" else None)
    assert len(stored) == len(expected) > 1
    for found, batch in zip(stored, expected, strict=True):
        found.check()
        torch.testing.assert_close(vars(found), vars(batch), rtol=0, atol=0)


def test_joined_batches_hold_the_same_users(file: Path) -> None:
    epoch = compare.Epoch.read(file)
    single, joined = epoch.batches("train"), epoch.batches("train", joined=3)
    assert len(joined) == -(-len(single) // 3)
    labels = torch.cat([batch.labels for batch in joined])
    assert torch.equal(labels, torch.cat([batch.labels for batch in single]))
    for batch in joined:
        batch.check()


def test_all_sides_train_and_are_written(file: Path, tmp_path: Path) -> None:
    given = compare.parse([f"--file={file}", f"--output={tmp_path}", "--dropout=0", *SMALL])
    outcomes = {outcome.name: outcome for outcome in compare.run(given, lambda _: None)}
    assert list(outcomes) == [side.name for side in compare.SIDES]
    reference = outcomes[compare.REFERENCE.name]
    assert reference.mean(0.1) < reference.mean()
    # Without dropout chance has no part, and autocast's rounding is all that is left.
    assert compare.against(outcomes[compare.CHANCE.name], reference)["rms_of_a_step"] == 0
    rounded = compare.against(outcomes["kernels, bfloat16"], reference)
    assert 0 < rounded["rms_of_a_step"] < 0.02
    with (tmp_path / "losses.csv").open() as written:
        rows = list(csv.DictReader(written))
    assert len(rows) == len(reference.losses)
    assert float(rows[3][reference.name]) == pytest.approx(reference.losses[3], abs=1e-5)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["sides"][reference.name]["mean_loss"] == reference.mean()
    assert (tmp_path / "losses.svg").read_text().startswith("<?xml")


def test_other_dropout_is_another_curve(file: Path) -> None:
    given = compare.parse([f"--file={file}", *SMALL])
    epoch = compare.changed(compare.Epoch.read(file), given)
    sides = (compare.REFERENCE, compare.REFERENCE, compare.CHANCE)
    first, again, other = (compare.train(replace(s, impl="auto"), epoch, CPU) for s in sides)
    assert (first.losses == again.losses).all()
    assert compare.against(other, first)["rms_of_a_step"] > 0


def test_it_runs_where_ray_mlflow_and_polars_are_missing(file: Path) -> None:
    blocked = ("ray", "mlflow", "polars", "pyarrow", "jsonargparse")
    program = f"""
import sys
for name in {blocked}:
    sys.modules[name] = None
from experiments.compare_gpu_training import parse, run
run(parse({[f"--file={file}", "--sides", compare.REFERENCE.name, *SMALL]}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert compare.REFERENCE.name in done.stdout
