"""A registered bundle is a model for MLflow's tools, and comes back whole or not at all."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest

from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.registry import CHALLENGER, CHAMPION, Registry, find_bundle, register
from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import BundleManifest

# MLflow and what it imports deprecate each other's names, which is none of our doing.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint:UserWarning"
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts of a database lie in the current folder, downloads in the user's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A registered model that no other test has."""
    return str(request.node.originalname)


@pytest.fixture
def as_default_store(database: str) -> Iterator[None]:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(database)
    yield
    mlflow.set_tracking_uri(before)


def another(bundle: Path, folder: Path) -> Path:
    """Copy a bundle and alter what decides nothing, so that it is another one."""
    shutil.copytree(bundle, folder)
    replace(BundleManifest.read(folder), metrics={"test": {"gauc": 0.25}}).write(folder)
    return folder


def artifacts(database: str, name: str, version: int) -> Path:
    return Path(mlflow.MlflowClient(database).get_model_version_download_uri(name, str(version)))


@pytest.mark.usefixtures("as_default_store")
def test_mlflow_scores_as_the_bundle_does(sdim_bundle: Path, database: str, name: str) -> None:
    version = register(sdim_bundle, name, database, None)
    bundle = Bundle.open(sdim_bundle)
    example = bundle.example()
    model = mlflow.pyfunc.load_model(f"models:/{name}@challenger")
    np.testing.assert_array_equal(model.predict(example)["scores"], bundle.run_scorer(example))
    signature = model.metadata.signature
    assert {spec.name for spec in signature.inputs} == set(example)
    assert [spec.name for spec in signature.outputs] == ["scores"]
    table = next(spec for spec in signature.inputs if spec.name == "table")
    assert table.shape == (-1, *bundle.layout.shape)
    graph = mlflow.onnx.load_model(f"models:/{name}/{version}")
    assert {tensor.name for tensor in graph.graph.input} == set(example)


@pytest.mark.usefixtures("as_default_store")
def test_mlflows_command_line_predicts(
    sdim_bundle: Path, database: str, name: str, tmp_path: Path
) -> None:
    version = register(sdim_bundle, name, database, None)
    asked = artifacts(database, name, version) / "serving_input_example.json"
    predict = ["models", "predict", "--env-manager", "local", "--input-path", str(asked)]
    where = ["--model-uri", f"models:/{name}/{version}", "--output-path", str(tmp_path / "out")]
    command = [sys.executable, "-m", "mlflow", *predict, *where]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "out").read_text())["predictions"]["scores"]
    bundle = Bundle.open(sdim_bundle)
    np.testing.assert_allclose(found, bundle.run_scorer(bundle.example()), atol=1e-6)


def test_what_scores_it_is_pinned_and_what_it_is_is_tagged(
    sdim_bundle: Path, database: str, name: str
) -> None:
    version = register(sdim_bundle, name, database, None)
    manifest = BundleManifest.read(sdim_bundle)
    required = (artifacts(database, name, version) / "requirements.txt").read_text().split()
    for library in ("onnxruntime", "numpy", "onnx"):
        assert f"{library}=={manifest.versions[library]}" in required
    tags = mlflow.MlflowClient(database).get_model_version(name, str(version)).tags
    assert tags["fingerprint"] == manifest.fingerprint
    assert tags["data_digest"] == manifest.data_digest
    assert tags["run"] == "sdim-run"
    assert tags["bundle_digest"] == manifest.digest


def test_a_version_belongs_to_the_run_of_its_training(
    sdim_bundle: Path, database: str, name: str
) -> None:
    client = mlflow.MlflowClient(database)
    run_id = client.create_run(client.create_experiment(name)).info.run_id
    version = client.get_model_version(name, str(register(sdim_bundle, name, database, run_id)))
    assert version.run_id == run_id
    (model,) = client.get_run(run_id).outputs.model_outputs
    assert model.model_id == version.tags["model_id"]


def test_a_registered_bundle_comes_back_whole(sdim_bundle: Path, database: str, name: str) -> None:
    version = register(sdim_bundle, name, database, None)
    by_alias = find_bundle(f"models:/{name}@challenger", database)
    assert find_bundle(f"models:/{name}/{version}", database) == by_alias
    assert Bundle.open(by_alias).manifest == BundleManifest.read(sdim_bundle)
    (by_alias / "scorer.onnx").unlink()
    Bundle.open(find_bundle(f"models:/{name}@challenger", database))
    assert find_bundle(str(sdim_bundle), "bogus://nowhere") == sdim_bundle


def test_a_bundle_is_one_version_however_often_it_is_registered(
    sdim_bundle: Path, database: str, name: str, tmp_path: Path
) -> None:
    assert register(sdim_bundle, name, database, None) == 1
    assert register(sdim_bundle, name, database, None) == 1
    assert register(another(sdim_bundle, tmp_path / "other"), name, database, None) == 2
    registry = Registry(database, name)
    assert registry.aliases() == {CHALLENGER: 2}
    registry.set_alias(CHAMPION, 1)
    assert register(sdim_bundle, name, database, None) == 1
    assert registry.aliases() == {CHALLENGER: 2, CHAMPION: 1}


def test_a_killed_registration_is_completed_by_the_next(
    sdim_bundle: Path, database: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in ("log_model_artifacts", "create_model_version", "set_registered_model_alias"):
        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, step, _killed)
            with pytest.raises(KeyboardInterrupt):
                register(sdim_bundle, name, database, None)
    assert register(sdim_bundle, name, database, None) == 1
    assert Registry(database, name).aliases() == {CHALLENGER: 1}
    Bundle.open(find_bundle(f"models:/{name}/1", database))


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_name_that_no_model_can_have_leaves_nothing_behind(
    sdim_bundle: Path, database: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"Invalid model name \('my\.model'\)"):
        register(sdim_bundle, "my.model", database, None)
    assert not list(tmp_path.rglob("MLmodel"))


def test_half_a_bundle_is_not_registered(
    sdim_bundle: Path, database: str, name: str, tmp_path: Path
) -> None:
    half = shutil.copytree(sdim_bundle, tmp_path / "half")
    (half / "weights.bin").unlink()
    with pytest.raises(BundleError, match=r"weights\.bin is missing"):
        register(half, name, database, None)
    with pytest.raises(BundleError, match="holds no bundle"):
        register(tmp_path / "nothing", name, database, None)
    assert Registry(database, name).aliases() == {}


@pytest.mark.parametrize("lost", ["bundle", "bundle/weights.bin"])
def test_a_registered_bundle_that_lost_a_part_is_told(
    sdim_bundle: Path, database: str, tmp_path: Path, lost: str
) -> None:
    name = f"lost-{lost.count('/')}"
    version = register(sdim_bundle, name, database, None)
    path = artifacts(database, name, version) / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(SettingsError, match=f"version 1 .*'{name}' has lost a part of its bundle"):
        find_bundle(f"models:/{name}/1", database)
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def test_what_is_not_registered_is_told_with_what_there_is(
    sdim_bundle: Path, database: str, name: str
) -> None:
    register(sdim_bundle, name, database, None)
    there = r"it has versions 1, aliases challenger \(version 1\)"
    for uri, message in (
        (f"models:/{name}@champion", f"has the alias 'champion' in {database}; {there}"),
        (f"models:/{name}/7", f"has no version 7 in {database}; {there}"),
        ("models:/nobody@champion", f"'nobody' .*; registered models: .*{name}"),
        (f"models:/{name}", "models:/name@alias or models:/name/3, got "),
    ):
        with pytest.raises(SettingsError, match=message) as caught:
            find_bundle(uri, database)
        assert "\n" not in str(caught.value)


def test_a_model_of_another_kind_holds_no_bundle(database: str, name: str) -> None:
    client = mlflow.MlflowClient(database)
    client.create_registered_model(name)
    client.create_model_version(name, "file:///somewhere")
    with pytest.raises(SettingsError, match=f"version 1 .*'{name}' holds no bundle"):
        find_bundle(f"models:/{name}/1", database)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////dev/null/mlflow.db"])
def test_a_store_that_cannot_be_used_is_one_line(
    sdim_bundle: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for use in (
        lambda: find_bundle("models:/any@champion", uri),
        lambda: register(sdim_bundle, "any", uri, None),
    ):
        with pytest.raises(SettingsError, match=f"MLflow cannot use {uri}") as caught:
            use()
        assert "\n" not in str(caught.value)
