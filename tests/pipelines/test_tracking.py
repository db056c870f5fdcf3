"""What MLflow and the run's folder hold in the end; one MLflow run for one training."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import mlflow
import numpy as np
import pytest
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError
from hashtab.pipelines import checkpoints, demo, driver, train_sdim
from hashtab.pipelines.checkpoints import Epoch
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.events import Tail
from hashtab.pipelines.report import summary
from hashtab.pipelines.runs import Result, Run
from hashtab.pipelines.saved_model import load_model
from hashtab.pipelines.settings import TrainSettings
from hashtab.pipelines.tracking import Commit, TrackedRun, Tracking, source_commit

# MLflow and what it imports deprecate each other's names, which is none of our doing.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@contextmanager
def disk_full_after(saves: int) -> Iterator[None]:
    """Let a training fail at one of its checkpoints."""
    left = [saves]
    save = checkpoints.save

    def failing(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", failing)
        yield


@pytest.fixture(scope="module")
def resumed(likes: Path, database: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that failed in its third epoch and was resumed."""
    from tests.pipelines.conftest import SMALL_MODEL, SMALL_OPTIMISER

    settings = TrainSettings(
        data=str(likes),
        model=replace(SMALL_MODEL, counters=True),
        optimiser=SMALL_OPTIMISER,
        workers=0,
        checkpoint_every=10,
        storage=str(tmp_path_factory.mktemp("resumed")),
        tracking_uri=database,
        experiment="resumed",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
        with disk_full_after(7), pytest.raises(DataError, match="is full"):
            train_sdim.train(settings)
        return train_sdim.train(replace(settings, resume=True))


def tracked(run: Run) -> MlflowRun:
    client = mlflow.MlflowClient(run.settings.tracking_uri)
    experiment = client.get_experiment_by_name(run.settings.experiment)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == run.tracked_as
    return found


def test_one_run_over_a_resume_with_each_epoch_once(resumed: Run) -> None:
    found = tracked(resumed)
    assert found.info.status == "FINISHED"
    client = mlflow.MlflowClient(resumed.settings.tracking_uri)
    for name in ("train/loss", "validation/gauc", "validation/log_loss", "train/samples_per_s"):
        history = client.get_metric_history(found.info.run_id, name)
        assert [metric.step for metric in history] == [1, 2, 3, 4]


def test_a_resumed_run_has_the_metrics_of_an_uninterrupted_one(
    resumed: Run, tmp_path: Path
) -> None:
    whole = train_sdim.train(
        replace(resumed.settings, resume=False, storage=str(tmp_path), experiment="whole")
    )
    assert whole.result.metrics == resumed.result.metrics


def test_settings_data_and_source_are_on_record(resumed: Run) -> None:
    found = tracked(resumed)
    record = found.data.params
    assert record["model.encoder"] == "sdim"
    assert record["model.tau"] == "3"
    assert record["optimiser.embedding_learning_rate"] == "0.05"
    assert (
        record["data_digest"]
        == json.loads((resumed.model / "model.json").read_text())["data_digest"]
    )
    commit = source_commit(Path(__file__).resolve().parents[2])
    if commit:
        assert found.data.tags["mlflow.source.git.commit"] == commit.sha
        assert found.data.tags["git.dirty"] in ("true", "false")


def test_final_metrics_come_with_slices(resumed: Run) -> None:
    logged = tracked(resumed).data.metrics
    for split in ("validation", "test"):
        for name, value in resumed.result.metrics[split].items():
            assert logged[f"best/{split}/{name}"] == pytest.approx(value)
    assert "best/test/gauc/item_repeat" in logged
    assert "best/test/gauc/history_1_49" in logged
    assert any(name.startswith("system/") for name in logged)


def test_plots_and_model_are_artifacts_and_files(resumed: Run) -> None:
    client = mlflow.MlflowClient(resumed.settings.tracking_uri)
    for folder, names in (
        ("plots", {"learning_curves.png", "calibration.png", "gauc_by_history.png"}),
        ("model", {"model.pt", "model.json"}),
    ):
        listed = client.list_artifacts(str(resumed.tracked_as), folder)
        assert {Path(item.path).name for item in listed} == names
        assert {path.name for path in (resumed.folder / folder).iterdir()} == names
    for plot in resumed.plots.iterdir():
        image = matplotlib.image.imread(plot)
        assert image.shape[1] >= 800
        assert np.unique(image.reshape(-1, image.shape[2]), axis=0).shape[0] > 10
    assert load_model(resumed.model).settings == resumed.settings.model


def test_a_finished_run_is_shown_again_when_resumed(resumed: Run) -> None:
    again = train_sdim.train(resumed.settings)
    text = summary(again)
    gauc = resumed.result.metrics["test"]["gauc"]
    for wanted in (f"{gauc:.4f}", "log loss", "item repeat", str(again.model), "mlflow ui"):
        assert wanted in text


def test_what_a_killed_driver_left_out_of_mlflow_is_made_up_for(
    resumed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(
        resumed.settings, resume=False, storage=str(tmp_path), experiment="left out", seed=3
    )
    with monkeypatch.context() as patch:
        patch.setattr(driver, "plot_run", _killed)
        with pytest.raises(KeyboardInterrupt):
            train_sdim.train(settings)
    run = train_sdim.train(replace(settings, resume=True))
    assert run.published
    found = tracked(run)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["best/test/gauc"] == run.result.metrics["test"]["gauc"]


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def run(settings: TrainSettings, dataset: Dataset) -> Run:
    """A run that was begun."""
    run = Run.find_or_resume(replace(settings, experiment="begun"), dataset.manifest)
    run.folder.mkdir(parents=True)
    run.begin(dataset.manifest)
    return run


def begin(run: Run, tracking_uri: str | None = None) -> TrackedRun:
    tracking = Tracking(tracking_uri or run.settings.tracking_uri, run.settings.experiment)
    return tracking.begin(run, "digest")


def finish(run: Run) -> Result:
    """Let a run be finished with two epochs."""
    epochs = tuple(
        Epoch(number=n, loss=0.5, seconds=1.0, samples_per_s=9.0, validation={"gauc": 0.6})
        for n in (1, 2)
    )
    metrics = {split: {"gauc": 0.6} for split in ("validation", "test")}
    run.model.mkdir(exist_ok=True)
    run.finish(Result(name=run.name, best_epoch=1, epochs=epochs, metrics=metrics))
    return run.result


def test_epochs_that_a_killed_driver_did_not_log_are_logged_in_the_end(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = finish(run).epochs
    tracked = begin(run)
    tracked.log_epochs([first])
    tracked.end("KILLED")
    monkeypatch.setattr(driver, "plot_run", lambda _, folder: folder.mkdir())
    with driver.Followed(run, Tail(run.log), lambda: begin(run)) as followed:
        followed.follow()
    assert run.published
    client = mlflow.MlflowClient(run.settings.tracking_uri)
    assert [m.step for m in client.get_metric_history(run.tracked_as, "train/loss")] == [1, 2]


def test_parameters_and_tags_are_there_however_often_it_was_killed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", _killed)
        with pytest.raises(KeyboardInterrupt):
            begin(run)
    begun = run.tracked_as
    more = replace(run, settings=replace(run.settings, workers=2))
    for one in (run, more):
        begin(one).end("KILLED")
    assert run.tracked_as == begun
    found = mlflow.MlflowClient(run.settings.tracking_uri).get_run(str(begun)).data
    assert found.params["model.encoder"] == "sdim"
    assert found.params["data_digest"] == "digest"
    assert found.params["workers"] == "0"
    assert found.tags["mlflow.source.name"] == "pipelines/train_sdim.py"


def test_a_deleted_experiment_is_said_before_any_training(
    settings: TrainSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    client = mlflow.MlflowClient(settings.tracking_uri)
    client.delete_experiment(client.create_experiment("deleted"))
    places = {name: getattr(settings, name) for name in ("data", "storage", "tracking_uri")}
    options = [f"--{name}={value}" for name, value in places.items()]
    assert train_sdim.main([*options, "--workers=0", "--experiment=deleted"]) == 2
    error = capsys.readouterr().err
    assert "experiment 'deleted'" in error
    assert "restore it, or choose another --experiment" in error
    assert error.count("\n") == 1
    assert not Path(settings.storage).exists()


def test_a_run_that_its_store_has_lost_begins_anew(run: Run) -> None:
    run.track_as("0" * 32, "sqlite:///lost.db")
    begin(run).end("KILLED")
    fresh = run.tracked_as
    assert fresh != "0" * 32
    assert run.tracked_in == run.settings.tracking_uri
    client = mlflow.MlflowClient(run.settings.tracking_uri)
    assert "model.encoder" in client.get_run(str(fresh)).data.params
    client.delete_run(str(fresh))
    begin(run).end("KILLED")
    assert run.tracked_as != fresh


def test_the_summary_names_the_store_that_holds_the_run(
    resumed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = replace(resumed.settings, resume=True, tracking_uri="sqlite:///elsewhere.db")
    again = train_sdim.train(elsewhere)
    text = summary(again)
    assert f"MLflow {resumed.settings.tracking_uri}, run {resumed.tracked_as}" in text
    assert "elsewhere" not in text


@pytest.mark.parametrize("uri", ["bogus://there", "sqlite:////dev/null/mlflow.db"])
def test_a_store_that_cannot_be_used_is_one_line(uri: str) -> None:
    with pytest.raises(SettingsError, match="MLflow cannot use ") as caught:
        Tracking(uri, "any")
    assert "\n" not in str(caught.value)


def test_a_store_that_takes_no_run_is_said_before_training(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise mlflow.exceptions.MlflowException("attempt to write\na readonly database")

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", refuse)
    with pytest.raises(SettingsError, match="attempt to write a readonly database"):
        train_sdim.train(settings)
    assert not list(Path(settings.storage).rglob("progress.jsonl"))


def test_the_rivals_plots_are_drawn_when_they_are_missing(
    settings: TrainSettings, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "plot_run", lambda _, folder: folder.mkdir())
    chosen = demo.DemoSettings(
        data=settings.data, storage=settings.storage, tracking_uri=settings.tracking_uri
    )
    runs = {n: demo.find(n, s, dataset) for n, s in list(chosen.rivals().items())[:2]}
    for one in runs.values():
        one.begin(dataset.manifest)
        finish(one)
        begin(one).end("FINISHED")
        one.publish()
    names = {"rivals.png", "gauc_by_history.png"}

    with monkeypatch.context() as patch:
        patch.setattr(Tracking, "add_artifacts", _killed)
        with pytest.raises(KeyboardInterrupt):
            demo.train_rivals(runs, dataset.manifest, chosen)
    demo.train_rivals(runs, dataset.manifest, chosen)
    assert {path.name for path in chosen.plots.iterdir()} == names
    client = mlflow.MlflowClient(settings.tracking_uri)
    for one in runs.values():
        listed = client.list_artifacts(str(one.tracked_as), "rivals")
        assert {Path(item.path).name for item in listed} == names
    assert {path.name for path in Path(settings.storage).iterdir()} == {
        "rivals",
        *(one.name for one in runs.values()),
    }


def test_the_commit_is_taken_from_the_environment_where_there_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert source_commit(tmp_path) is None
    monkeypatch.setenv("GIT_COMMIT", "abc123")
    assert source_commit(tmp_path) == Commit("abc123", dirty=None)


def test_a_training_goes_on_without_its_tracking_server_and_tells_it_all_when_it_is_back(
    likes: Path, database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.pipelines.conftest import SMALL_MODEL, SMALL_OPTIMISER

    def unreachable(*_: Any, **__: Any) -> None:
        raise MlflowException("connection refused")

    settings = TrainSettings(
        data=str(likes),
        model=SMALL_MODEL,
        optimiser=replace(SMALL_OPTIMISER, epochs=2),
        workers=0,
        storage=str(tmp_path),
        tracking_uri=database,
        experiment="lost",
    )
    with pytest.MonkeyPatch.context() as patch:
        # The first call, with the settings, arrives; then the server is gone.
        arrives = [mlflow.MlflowClient.log_batch]
        patch.setattr(
            mlflow.MlflowClient,
            "log_batch",
            lambda *a, **k: (arrives.pop() if arrives else unreachable)(*a, **k),
        )
        run = train_sdim.train(settings)
    assert run.finished
    assert not run.published
    assert "goes on without it" in capsys.readouterr().err
    back = train_sdim.train(replace(settings, resume=True))
    losses = mlflow.MlflowClient(database).get_metric_history(back.tracked_as, "train/loss")
    assert [loss.step for loss in losses] == [1, 2]
    assert tracked(back).info.status == "FINISHED"
