"""The loop learns, and is a function of settings and data, however often it is interrupted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hashtab.features.dataset import Dataset
from hashtab.models.ctr import ClickModel
from hashtab.pipelines import training
from hashtab.pipelines.checkpoints import Progress
from hashtab.pipelines.evaluation import predict
from hashtab.pipelines.ranks import Ranks
from hashtab.pipelines.settings import TrainSettings
from hashtab.pipelines.training import Training, falling, train


class Interrupted(Exception):
    """Stands for a kill."""


def run(
    settings: TrainSettings, dataset: Dataset, checkpoint: Path, stop_at: int | None = None
) -> tuple[ClickModel, Progress]:
    def listen(event: str, progress: Progress) -> None:
        if event == "step" and progress.step == stop_at:
            raise Interrupted

    return train(Training(settings, dataset, checkpoint, Ranks()), listen)


@pytest.mark.parametrize(
    ("encoder", "counters"), [("sdim", False), ("mean", False), ("none", True)]
)
def test_every_way_to_see_the_past_learns_what_users_like(
    encoder: str, counters: bool, settings: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    model = replace(settings.model, encoder=encoder, counters=counters)
    trained, _ = run(replace(settings, model=model), dataset, tmp_path / "c.pt")
    found = predict(trained, dataset, "test", settings.optimiser, Ranks())
    assert found is not None
    assert found.metrics()["gauc"] > 0.68


def test_without_a_past_there_is_nothing_to_learn(
    settings: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    blind = replace(settings, model=replace(settings.model, encoder="none"))
    trained, _ = run(blind, dataset, tmp_path / "c.pt")
    found = predict(trained, dataset, "test", settings.optimiser, Ranks())
    assert found is not None
    assert found.metrics()["gauc"] < 0.6


@pytest.mark.parametrize("stops", [(1,), (5,), (30, 31, 60), (99,)])
def test_an_interrupted_training_ends_with_the_same_bits(
    stops: tuple[int, ...], settings: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    whole, told = run(settings, dataset, tmp_path / "whole.pt")
    for stop in stops:
        with pytest.raises(Interrupted):
            run(settings, dataset, tmp_path / "torn.pt", stop_at=stop)
    torn, told_torn = run(settings, dataset, tmp_path / "torn.pt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, torn.state_dict()[name]), name
    pairs = list(zip(told.epochs, told_torn.epochs, strict=True))
    assert all(a.validation == b.validation and a.loss == b.loss for a, b in pairs)


def test_reading_the_loss_rarely_changes_nothing(
    settings: TrainSettings, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, where each reading waits for the device.
    often, told = run(settings, dataset, tmp_path / "often.pt")
    monkeypatch.setattr(training, "_reads", lambda _, p: p.batch in (7, p.batches))
    rarely, told_rarely = run(settings, dataset, tmp_path / "rarely.pt")
    for name, value in often.state_dict().items():
        assert torch.equal(value, rarely.state_dict()[name]), name
    for a, b in zip(told.epochs, told_rarely.epochs, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-12)
        assert a.validation == b.validation


def test_a_seed_gives_the_same_bits_and_another_seed_others(
    settings: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    first, again, other = (
        run(replace(settings, seed=seed), dataset, tmp_path / f"{i}.pt")[0].state_dict()
        for i, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["encoder.planes"], other["encoder.planes"])


def test_the_best_epoch_is_kept_and_patience_ends_the_training(
    settings: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    restless = replace(
        settings.optimiser, epochs=40, patience=2, learning_rate=0.03, embedding_learning_rate=0.2
    )
    model, progress = run(replace(settings, optimiser=restless), dataset, tmp_path / "c.pt")
    assert progress.epoch < 40
    assert progress.epoch - progress.best == 2
    scores = [epoch.gauc for epoch in progress.epochs]
    assert scores[progress.best - 1] == max(scores)
    found = predict(model, dataset, "validation", restless, Ranks())
    assert found is not None
    assert found.metrics()["gauc"] == max(scores)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rates_fall_from_their_value_to_zero(schedule: str) -> None:
    shares = torch.linspace(0, 1, 11).tolist()
    left = [falling(schedule, share) for share in shares]
    assert left[0] == 1
    assert left[-1] == pytest.approx(0)
    assert left == sorted(left, reverse=True)
