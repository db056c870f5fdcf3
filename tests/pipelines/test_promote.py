"""The registry and who is champion in it: what is promoted, kept, brought back and refused."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest

from hashtab.features.dataset import Dataset
from hashtab.pipelines import promote as command
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.comparison import compare
from hashtab.pipelines.evaluation import Predictions, predict
from hashtab.pipelines.mlflow_model import input_example
from hashtab.pipelines.promote import PromoteSettings, promote
from hashtab.pipelines.ranks import Ranks
from hashtab.pipelines.registry import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Registry,
    find_bundle,
    register,
)
from hashtab.pipelines.saved_model import load_model
from hashtab.pipelines.settings import OptimiserSettings
from hashtab.pipelines.split_scores import score_split
from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import BundleError

# MLflow and what it imports deprecate each other's names, which is none of our doing.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint:UserWarning"
)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settings(request: pytest.FixtureRequest, likes: Path, database: str) -> PromoteSettings:
    """Of a registered model of the test's own."""
    return PromoteSettings(name=request.node.name, data=str(likes), tracking_uri=database)


def aliases(settings: PromoteSettings) -> dict[str, int]:
    return Registry(settings.tracking_uri, settings.name).aliases()


def registered(settings: PromoteSettings, *bundles: Path) -> list[int]:
    return [register(bundle, settings.name, settings.tracking_uri, None) for bundle in bundles]


def test_a_registered_bundle_comes_back_whole_and_mlflow_scores_with_it(
    settings: PromoteSettings, sdim_bundle: Path
) -> None:
    (version,) = registered(settings, sdim_bundle)
    uri = f"models:/{settings.name}@challenger"
    folder = find_bundle(uri, settings.tracking_uri)
    bundle = Bundle.open(folder)
    assert folder != sdim_bundle
    assert find_bundle(f"models:/{settings.name}/{version}", settings.tracking_uri) == folder
    example = input_example(bundle)
    mlflow.set_tracking_uri(settings.tracking_uri)
    scores = mlflow.pyfunc.load_model(uri).predict(example)["scores"]
    assert np.array_equal(scores, bundle.run_scorer(example))
    assert mlflow.onnx.load_model(uri).graph.output[0].name == "scores"


def test_the_same_bundle_is_one_version(settings: PromoteSettings, sdim_bundle: Path) -> None:
    first, second = registered(settings, sdim_bundle, sdim_bundle)
    assert first == second
    assert aliases(settings) == {CHALLENGER: first}


def test_the_first_challenger_becomes_champion(
    settings: PromoteSettings, sdim_bundle: Path
) -> None:
    (version,) = registered(settings, sdim_bundle)
    assert promote(settings).promoted
    assert aliases(settings) == {CHAMPION: version}


def test_a_better_challenger_is_promoted_and_rolled_back(
    settings: PromoteSettings, sdim_bundle: Path, fitted_bundle: Path
) -> None:
    registered(settings, sdim_bundle)
    promote(settings)
    registered(settings, fitted_bundle)
    outcome = promote(settings)
    assert outcome.promoted, outcome.text
    assert aliases(settings) == {CHAMPION: 2, PREVIOUS: 1}
    assert promote(PromoteSettings(**{**vars(settings), "rollback": True})).promoted
    assert aliases(settings) == {CHAMPION: 1, CHALLENGER: 2}
    with pytest.raises(SettingsError, match=r"no version .* has the alias 'previous'"):
        promote(PromoteSettings(**{**vars(settings), "rollback": True}))


def test_a_challenger_that_is_not_better_is_promoted_by_force_alone(
    settings: PromoteSettings, sdim_bundle: Path, fitted_bundle: Path
) -> None:
    registered(settings, fitted_bundle)
    promote(settings)
    registered(settings, sdim_bundle)
    assert not promote(settings).promoted
    assert aliases(settings) == {CHAMPION: 1, CHALLENGER: 2}
    promote(PromoteSettings(**{**vars(settings), "force": True}))
    assert aliases(settings) == {CHAMPION: 2, PREVIOUS: 1}


def test_a_promotion_that_was_killed_is_finished_by_the_next(
    settings: PromoteSettings, sdim_bundle: Path, fitted_bundle: Path
) -> None:
    registered(settings, sdim_bundle)
    promote(settings)
    registered(settings, fitted_bundle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, "remove_alias", _killed)
        with pytest.raises(KeyboardInterrupt):
            promote(settings)
    assert aliases(settings)[CHAMPION] == 2
    assert promote(settings).promoted
    assert aliases(settings) == {CHAMPION: 2, PREVIOUS: 1}


def _killed(*_: object) -> Iterator[None]:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["fitted", "long_short", "mean", "none", "din"])
def test_a_bundle_scores_a_split_as_torch_does(
    kind: str, likes: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_bundle")
    dataset = Dataset.open(likes)
    served = score_split(Bundle.open(folder), dataset, "validation")
    model = load_model(folder.parent / "model")
    torch_scores = predict(model, dataset, "validation", OptimiserSettings(), Ranks())
    assert torch_scores is not None
    assert np.array_equal(served.users, torch_scores.users)
    assert np.abs(served.scores - torch_scores.scores).max() < 1e-4


def test_the_bootstrap_tells_a_better_model_from_an_equal_one() -> None:
    random = np.random.default_rng(0)
    users, labels = np.repeat(np.arange(200), 20), random.integers(0, 2, 4000).astype(np.float32)
    noise = random.random((2, 4000))
    weak, equal = (predictions(labels, 0.1 * labels + part, users) for part in noise)
    strong = predictions(labels, labels + noise[0], users)
    assert compare(weak, strong, 500, 0.95).better
    assert not compare(weak, equal, 500, 0.95).better
    assert compare(weak, weak, 500, 0.95).difference == 0


def predictions(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> Predictions:
    none = np.zeros(len(labels), np.int64)
    return Predictions(
        labels=labels,
        scores=scores,
        users=users,
        history_lengths=none,
        item_counts=none.astype(np.int32),
    )


def test_what_cannot_be_used_ends_with_one_line(
    settings: PromoteSettings, sdim_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--name", settings.name, "--tracking_uri", settings.tracking_uri]
    assert command.main(where) == 2
    registered(settings, sdim_bundle)
    assert command.main([*where, "--rollback"]) == 2
    assert command.main([*where[:2], "--tracking_uri", "http://127.0.0.1:9"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert "has the alias 'challenger'" in lines[0]
    assert "has the alias 'previous'" in lines[1]
    assert "MLflow cannot use http://127.0.0.1:9" in lines[2]
    with pytest.raises(SettingsError, match=r"alias 'winner'.*challenger"):
        find_bundle(f"models:/{settings.name}@winner", settings.tracking_uri)
    with pytest.raises(BundleError, match="holds no bundle"):
        register(tmp_path / "nothing", settings.name, settings.tracking_uri, None)
