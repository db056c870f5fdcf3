"""Metrics are exact and count rule and calibration are what they say."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from hashtab.features.dataset import Dataset
from hashtab.features.metrics import gauc
from hashtab.models.ctr import ClickModel, FeatureSpec, TensorBatch
from hashtab.pipelines.count_rule import apply_count_rule, count_scores
from hashtab.pipelines.evaluation import Predictions, predict
from hashtab.pipelines.ranks import Ranks
from tests.pipelines.conftest import SMALL_MODEL, SMALL_OPTIMISER


def predictions(n: int = 1000) -> Predictions:
    rng = np.random.default_rng(0)
    scores = rng.random(n)
    return Predictions(
        labels=(rng.random(n) < scores).astype(np.float32),
        scores=scores,
        users=rng.integers(0, 20, n),
        history_lengths=rng.integers(0, 300, n),
        item_counts=rng.integers(0, 2, n).astype(np.int32),
    )


def test_metrics_do_not_depend_on_who_scored_what() -> None:
    whole = predictions()
    shuffled = np.random.default_rng(1).permutation(len(whole.labels))
    parts = [
        Predictions(**{name: value[rows] for name, value in vars(whole).items()})
        for rows in np.array_split(shuffled, 3)
    ]
    joined = Predictions.join(parts).metrics()
    for name, value in whole.metrics().items():
        np.testing.assert_allclose(joined[name], value, rtol=1e-12, err_msg=name)


def test_slices_cover_history_length_and_repetition() -> None:
    found = predictions().metrics()
    by_length = ["history_0", "history_1_49", "history_50_199", "history_200_499"]
    for names in (by_length, ["item_first", "item_repeat"]):
        assert sum(found[f"samples/{name}"] for name in names) == found["samples"]


@pytest.mark.parametrize("encoder", ["sdim", "mean", "full_target_attention"])
def test_a_score_does_not_depend_on_what_its_batch_leaves_out(
    encoder: str, dataset: Dataset
) -> None:
    torch.manual_seed(0)
    spec = FeatureSpec.from_dict(asdict(dataset.manifest.features))
    model = ClickModel(spec, replace(SMALL_MODEL, encoder=encoder, history_limit=7)).eval()
    found = predict(model, dataset, "test", SMALL_OPTIMISER, Ranks())
    assert found is not None
    whole = [
        model(TensorBatch.from_numpy(batch)).detach().double().sigmoid().numpy()
        for batch in dataset.batches("test", SMALL_OPTIMISER.samples_per_batch)
    ]
    np.testing.assert_allclose(found.scores, np.concatenate(whole), rtol=1e-5)


def test_calibration_of_true_probabilities_lies_on_the_diagonal() -> None:
    points = np.array(predictions(100_000).calibration())
    assert len(points) == 20
    assert np.abs(points[:, 0] - points[:, 1]).max() < 0.03


def test_the_count_rule_counts_items_tenfold_and_kinds_once(dataset: Dataset) -> None:
    (batch, *_) = dataset.batches("test", 10_000)
    scores = count_scores(batch, ("item", "kind"), "item")
    starts = np.repeat(batch.history_offsets[:-1], np.diff(batch.sample_offsets))
    for i in range(0, len(scores), 17):
        seen = slice(starts[i], starts[i] + batch.cuts[i])
        items = (batch.behaviours["item"][seen] == batch.candidates["item"][i]).sum()
        kinds = (batch.behaviours["kind"][seen] == batch.candidates["kind"][i]).sum()
        assert scores[i] == 10 * items + kinds


def test_the_count_rule_ranks_without_training_and_has_no_log_loss(dataset: Dataset) -> None:
    found = apply_count_rule(dataset, ("validation", "test")).metrics
    assert found["test"]["gauc"] > 0.65
    assert "log_loss" not in found["test"]
    parts = list(dataset.batches("test", 100))
    scores = np.concatenate([count_scores(b, ("item", "kind"), "item") for b in parts])
    labels = np.concatenate([b.labels for b in parts])
    users = np.concatenate([np.repeat(b.users, np.diff(b.sample_offsets)) for b in parts])
    assert found["test"]["gauc"] == gauc(labels, scores, users)
