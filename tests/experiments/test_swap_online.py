"""Models are swapped under load without a failed request and without a score of two versions."""

import json
from pathlib import Path

import pytest

from experiments.online.swaps import Checked, Plan, swap
from hashtab.features.dataset import Dataset
from tests.pipelines.bundles import export_bundle, small_model

SWAPS = 5


@pytest.fixture(scope="module")
def bundles(shop_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models of one data set with weights and planes of their own."""
    dataset, folder = Dataset.open(shop_data), tmp_path_factory.mktemp("models")
    models = [small_model(dataset, "sdim", counters=True, seed=seed) for seed in range(2)]
    return [export_bundle(folder / str(i), model, dataset) for i, model in enumerate(models)]


def test_no_request_fails_and_no_score_mixes_versions(bundles: list[Path], tmp_path: Path) -> None:
    plan = Plan(bundles=bundles, work=tmp_path, swaps=SWAPS, every_s=0.5, seconds=2.0)
    figures, found, failed = swap(plan)
    assert figures.rows[0]["swaps"] == SWAPS
    assert len(found.by_model) == len(bundles)
    assert found.by_model.total() > 100
    assert (failed, found.wrong, found.without_table) == (0, 0, 0), found.examples


def test_a_score_of_another_models_tables_is_noticed() -> None:
    expected = {"a": [[0.25, 0.5]], "b": [[0.25, 0.75]]}
    answer = {"model": {"digest": "a"}, "history": "table", "degraded": None}
    found = Checked()
    for scores in ([0.25, 0.5], [0.25, 0.75]):
        found.look(expected, 0, 200, json.dumps(answer | {"scores": scores}).encode())
    found.look(expected, 0, 503, b"{}")
    assert (found.by_model["a"], found.wrong) == (2, 1)
    assert len(found.examples) == 2
