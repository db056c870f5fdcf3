"""A checkpoint serves its own training only; a saved model is what it says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hashtab.features.dataset import Dataset
from hashtab.pipelines import checkpoints
from hashtab.pipelines.checkpoints import CheckpointError, Progress
from hashtab.pipelines.evaluation import predict
from hashtab.pipelines.ranks import Ranks
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
