"""A checkpoint serves its own training only; a saved model is what it says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hashtab.features.dataset import Dataset
from hashtab.pipelines import checkpoints, ray_training
from hashtab.pipelines.checkpoints import CheckpointError, DiskFullError, Progress
from hashtab.pipelines.evaluation import predict
from hashtab.pipelines.ranks import Ranks
from hashtab.pipelines.runs import Run
from hashtab.pipelines.saved_model import load_model, save_model
from hashtab.pipelines.settings import TrainSettings
from hashtab.pipelines.training import Training, build, train


def begun(settings: TrainSettings, dataset: Dataset, path: Path) -> Training:
    """A training with a checkpoint before its first step."""
    training = Training(settings, dataset, path, Ranks())
    model, optimiser = build(training)
    batches = dataset.n_batches("train", settings.optimiser.samples_per_batch)
    checkpoints.save(path, training.identity, Progress(batches=batches), model, optimiser)
    return training


def go_on(training: Training) -> None:
    train(training, lambda *_: None)


def test_other_data_is_refused(
    settings: TrainSettings, dataset: Dataset, other_likes: Path, tmp_path: Path
) -> None:
    training = begun(settings, dataset, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="another training: data digest was"):
        go_on(replace(training, dataset=Dataset.open(other_likes)))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"planes": 24}, "model.planes was 12, now 24"), ({"tau": 4}, "model.tau was 3, now 4")],
)
def test_other_settings_are_refused_by_name(
    change: dict[str, Any], said: str, settings: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    training = begun(settings, dataset, tmp_path / "c.pt")
    other = replace(settings, model=replace(settings.model, **change))
    with pytest.raises(CheckpointError, match=said):
        go_on(replace(training, settings=other))


def test_other_planes_are_refused(
    settings: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "c.pt"
    training = begun(settings, dataset, path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "planes": "0" * 64}, path)
    with pytest.raises(CheckpointError, match="hash planes had digest 000000000000, now"):
        go_on(training)


def test_another_length_of_an_epoch_is_refused(
    settings: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "c.pt"
    training = begun(settings, dataset, path)
    content = torch.load(path, weights_only=True)
    content["progress"]["batches"] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="batches an epoch were"):
        go_on(training)


def test_a_kill_while_writing_leaves_the_last_checkpoint(
    settings: TrainSettings, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    training = begun(settings, dataset, path)
    before = path.read_bytes()

    def torn(_: object, to: Path) -> None:
        to.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(KeyboardInterrupt):
            go_on(training)
    assert path.read_bytes() == before

    run = Run(tmp_path, settings)
    strays = [tmp_path / ".c.pt.123.tmp", tmp_path / "model" / ".model.pt.123.tmp"]
    strays[1].parent.mkdir()
    for stray in strays:
        stray.write_bytes(b"half")
    with run.locked():
        assert not [stray for stray in strays if stray.exists()]
        assert path.read_bytes() == before


FULL = r"c.pt cannot be written, its disk is full: free some space and go on with --resume"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
)
def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(
    error: Exception,
    settings: TrainSettings,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "c.pt"
    training = begun(settings, dataset, path)
    before = path.read_bytes()

    def full(_: object, to: Path) -> None:
        to.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=FULL):
            go_on(training)
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]
    assert path.read_bytes() == before


def test_another_failure_to_write_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "save", lost)
    with pytest.raises(RuntimeError, match="CUDA error"):
        checkpoints.write_atomically(tmp_path / "c.pt", {})


def test_a_full_disk_met_by_torch_is_said(tiny_disk: Path) -> None:
    with pytest.raises(CheckpointError, match=FULL):
        checkpoints.write_atomically(tiny_disk / "c.pt", {"weights": torch.zeros(100_000)})
    assert not list(tiny_disk.iterdir())


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_checkpoint_that_is_cut_short_is_said(
    kept: float, settings: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "c.pt"
    training = begun(settings, dataset, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=r"c.pt cannot be read .* remove it: --resume"):
        go_on(training)


def test_a_saved_model_scores_as_the_trained_one(
    settings: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    model, _ = train(Training(settings, dataset, tmp_path / "c.pt", Ranks()), lambda *_: None)
    save_model(tmp_path / "model", model, dataset.manifest)
    loaded = load_model(tmp_path / "model")
    trained, again = (
        predict(m, dataset, "test", settings.optimiser, Ranks()) for m in (model, loaded)
    )
    assert trained is not None
    assert again is not None
    assert (trained.scores == again.scores).all()


def test_a_saved_model_with_other_planes_is_refused(
    settings: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    model, _ = build(Training(settings, dataset, tmp_path / "c.pt", Ranks()))
    save_model(tmp_path, model, dataset.manifest)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    state["encoder.planes"][0, 0] += 1
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="hash planes"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("error", "apart", "raised"),
    [
        (CheckpointError("another training"), False, False),
        (CheckpointError("another training"), True, True),
        (DiskFullError("full"), False, True),
    ],
)
def test_a_worker_raises_what_it_alone_has_met(
    error: CheckpointError, apart: bool, raised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray_training, "_train_share", fail)
    config = {"runs": [], "apart": apart}
    if raised:
        with pytest.raises(CheckpointError, match=str(error)):
            ray_training._work(config)
    else:
        assert ray_training._work(config) == str(error)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning:ray")
def test_what_a_worker_says_of_a_checkpoint_reaches_the_driver(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train import WorkerGroupError

    class Failing:
        def fit(self) -> None:
            raise WorkerGroupError("lost", {0: RuntimeError("closed"), 1: DiskFullError("full")})

    monkeypatch.setattr(ray_training, "_trainer", lambda *_: Failing())
    with pytest.raises(CheckpointError, match="full"):
        ray_training.fit([Run(tmp_path, settings)])
