"""Who is champion: what is promoted, kept, brought back and refused, and on what grounds."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import mlflow
import numpy as np
import polars as pl
import pytest

from hashtab.features.dataset import Dataset
from hashtab.features.encoders import FIRST_ID, Scaler, Vocabulary
from hashtab.features.errors import DataError
from hashtab.features.prepare import prepare
from hashtab.pipelines import promote as command
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.comparison import compare
from hashtab.pipelines.evaluation import Predictions, predict
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
from hashtab.pipelines.split_scores import TranslatedDataset, score_split
from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import BundleError
from tests.features import logs
from tests.pipelines.conftest import START, write_likes

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
    assert promote(replace(settings, rollback=True)).promoted
    assert aliases(settings) == {CHAMPION: 1}
    with pytest.raises(SettingsError, match=r"no version .* has the alias 'previous'"):
        promote(replace(settings, rollback=True))


def test_a_challenger_that_is_not_better_is_promoted_by_force_alone(
    settings: PromoteSettings, sdim_bundle: Path, fitted_bundle: Path
) -> None:
    registered(settings, fitted_bundle)
    promote(settings)
    registered(settings, sdim_bundle)
    assert not promote(settings).promoted
    assert aliases(settings) == {CHAMPION: 1, CHALLENGER: 2}
    promote(replace(settings, force=True))
    assert aliases(settings) == {CHAMPION: 2, PREVIOUS: 1}


# A promotion moves three aliases, a rollback two.
@pytest.mark.parametrize(
    ("rollback", "done"), [(False, 0), (False, 1), (False, 2), (True, 0), (True, 1)]
)
def test_what_was_killed_is_finished_by_the_next(
    settings: PromoteSettings, sdim_bundle: Path, fitted_bundle: Path, rollback: bool, done: int
) -> None:
    registered(settings, sdim_bundle)
    promote(settings)
    registered(settings, fitted_bundle)
    if rollback:
        promote(replace(settings, force=True))
        settings = replace(settings, rollback=True)
    with killed_after(done), pytest.raises(KeyboardInterrupt):
        promote(settings)
    assert aliases(settings)[CHAMPION] in (1, 2)
    assert promote(settings).promoted
    expected = {CHAMPION: 1} if rollback else {CHAMPION: 2, PREVIOUS: 1}
    assert aliases(settings) == expected


@contextmanager
def killed_after(writes: int) -> Iterator[None]:
    """Let the process be killed when it moves its next alias but so many."""
    left = [writes]

    def counted(move: Callable[..., None]) -> Callable[..., None]:
        def moving(*arguments: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            move(*arguments)

        return moving

    with pytest.MonkeyPatch.context() as patch:
        for name in ("set_alias", "remove_alias"):
            patch.setattr(Registry, name, counted(getattr(Registry, name)))
        yield


def test_why_a_model_was_promoted_is_on_record(
    settings: PromoteSettings, sdim_bundle: Path, fitted_bundle: Path, likes: Path
) -> None:
    registered(settings, sdim_bundle)
    promote(settings)
    registered(settings, fitted_bundle)
    assert "gAUC" in promote(settings).text
    client = mlflow.MlflowClient(settings.tracking_uri)
    version = client.get_model_version(settings.name, "2")
    assert version.tags["promotion"] == "better than version 1"
    stored = Path(client.get_model_version_download_uri(settings.name, "2")) / "comparison-with-1"
    found = json.loads((stored / "comparison.json").read_text())
    assert 0 < found["low"] < found["difference"] < found["high"]
    assert float(version.tags["gauc_difference"]) == pytest.approx(found["difference"], abs=1e-5)
    assert found["data_digest"] == Dataset.open(likes).manifest.digest
    assert matplotlib.image.imread(stored / "comparison.png").shape[1] > 500
    registered(settings, sdim_bundle)
    promote(replace(settings, force=True))
    forced = client.get_model_version(settings.name, "1").tags["promotion"]
    assert forced == "forced over version 2"


@pytest.mark.parametrize("kind", ["fitted", "long_short", "mean", "none", "din", "shop"])
def test_a_bundle_scores_a_split_as_torch_does(
    kind: str, likes: Path, shop_data: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_bundle")
    dataset = Dataset.open(shop_data if kind == "shop" else likes)
    served = score_split(Bundle.open(folder), dataset, "validation")
    model = load_model(folder.parent / "model")
    torch_scores = predict(model, dataset, "validation", OptimiserSettings(), Ranks())
    assert torch_scores is not None
    assert np.array_equal(served.users, torch_scores.users)
    assert np.abs(served.scores - torch_scores.scores).max() < 1e-4


def test_other_data_of_the_same_log_gives_the_same_scores(
    likes: Path, sdim_bundle: Path, tmp_path: Path
) -> None:
    schema = write_likes(tmp_path)
    first = {"user": [-1], "item": [-5], "at": [START]}  # whose ids come before all others
    for name, extra in (("watched", first), ("shown", {**first, "response": [0]})):
        path = tmp_path / f"{name}.parquet"
        log = pl.read_parquet(path)
        pl.concat([pl.DataFrame(extra, schema=log.schema), log]).write_parquet(path)
    items = pl.read_parquet(tmp_path / "items.parquet")
    added = pl.DataFrame({"item": [-5], "kind": [-1]}, schema=items.schema)
    pl.concat([added, items]).write_parquet(tmp_path / "items.parquet")
    prepare(schema, tmp_path / "shifted", shards=3)
    shifted, same = Dataset.open(tmp_path / "shifted"), Dataset.open(likes)
    assert shifted.encoders["kind"] != same.encoders["kind"]
    bundle = Bundle.open(sdim_bundle)
    found, expected = (score_split(bundle, data, "validation") for data in (shifted, same))
    np.testing.assert_allclose(np.sort(found.scores), np.sort(expected.scores), atol=1e-6)
    assert found.metrics()["gauc"] == pytest.approx(expected.metrics()["gauc"])


def test_features_of_behaviours_and_requests_keep_their_values_in_other_ids(
    shop_bundle: Path, tmp_path: Path
) -> None:
    schema = logs.shop(tmp_path, seed=1)
    for name in ("purchases", "promotions"):
        path = tmp_path / f"{name}.parquet"
        pl.read_parquet(path).with_columns(pl.col("store") + 1).write_parquet(path)
    prepare(schema, tmp_path / "shop", shards=2)
    data, bundle = Dataset.open(tmp_path / "shop"), Bundle.open(shop_bundle)
    stored = next(data.batches("validation", 10_000, 12))
    batch = next(TranslatedDataset(data, bundle).translated("validation"))
    own, known = (x.encoders["store"] for x in (data, bundle))
    assert isinstance(own, Vocabulary)
    assert isinstance(known, Vocabulary)
    raw = np.array(own.values)[stored.behaviours["store"] - FIRST_ID]
    value = np.array([0, -1, *known.values])[batch.behaviours["store"]]
    np.testing.assert_array_equal(value, np.where(raw == 3, -1, raw))  # the bundle knows 0 to 2
    before, after = data.encoders["price"], bundle.encoders["price"]
    assert isinstance(before, Scaler)
    assert isinstance(after, Scaler)
    prices = stored.behaviours["price"] * before.std + before.mean
    np.testing.assert_allclose(
        batch.behaviours["price"] * after.std + after.mean, prices, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(batch.context["hour"], stored.context["hour"])
    assert score_split(bundle, data, "validation").metrics()["samples"] == len(stored.labels)


def test_data_that_lacks_what_a_model_reads_is_told(
    sdim_bundle: Path, shop_bundle: Path, feed_without_counters: Path, shop_data: Path
) -> None:
    bundle, shop = Bundle.open(sdim_bundle), Bundle.open(shop_bundle)
    with pytest.raises(DataError, match="has no counter 'kind', which the model reads"):
        score_split(bundle, Dataset.open(feed_without_counters), "validation")
    with pytest.raises(DataError, match="has no counter 'item', which the model reads"):
        score_split(bundle, Dataset.open(shop_data), "validation")
    with pytest.raises(DataError, match="has no counter 'product'"):
        score_split(shop, Dataset.open(feed_without_counters), "validation")
    with pytest.raises(DataError, match="no split 'nonsense'"):
        score_split(shop, Dataset.open(shop_data), "nonsense")


def test_the_bootstrap_tells_a_better_model_from_an_equal_one() -> None:
    random = np.random.default_rng(0)
    users, labels = np.repeat(np.arange(200), 20), random.integers(0, 2, 4000).astype(np.float32)
    noise = random.random((2, 4000))
    weak, equal = (predictions(labels, 0.1 * labels + part, users) for part in noise)
    strong = predictions(labels, labels + noise[0], users)
    assert compare(weak, strong, 500, 0.95).better
    assert not compare(weak, equal, 500, 0.95).better
    assert compare(weak, weak, 500, 0.95).difference == 0
    assert not compare(weak, weak, 500, 0.95).better
    negative = predictions(np.zeros(9, np.float32), np.zeros(9), np.arange(9))
    with pytest.raises(DataError, match="no user has samples of both labels"):
        compare(negative, negative, 500, 0.95)


def predictions(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> Predictions:
    none = np.zeros(len(labels), np.int64)
    return Predictions(
        labels=labels,
        scores=scores,
        users=users,
        history_lengths=none,
        item_counts=none.astype(np.int32),
    )


def test_the_exit_code_says_whether_there_is_a_new_champion(
    settings: PromoteSettings, sdim_bundle: Path, fitted_bundle: Path, likes: Path
) -> None:
    where = [f"--{name}={getattr(settings, name)}" for name in ("name", "data", "tracking_uri")]
    registered(settings, fitted_bundle)
    assert command.main(where) == 0
    registered(settings, sdim_bundle)
    assert command.main(where) == 1
    assert command.main([*where, "--force", "--rollback"]) == 2
    assert aliases(settings) == {CHAMPION: 1, CHALLENGER: 2}


def test_what_cannot_be_used_ends_with_one_line(
    settings: PromoteSettings,
    sdim_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
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
