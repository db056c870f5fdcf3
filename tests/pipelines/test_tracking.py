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

from hashtab.pipelines import checkpoints, train_sdim
from hashtab.pipelines.report import summary
from hashtab.pipelines.runs import Run
from hashtab.pipelines.saved_model import load_model
from hashtab.pipelines.settings import TrainSettings
from hashtab.pipelines.tracking import source_commit

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
        with disk_full_after(7), pytest.raises(OSError, match="No space left"):
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
    text = summary(again, again.settings.tracking_uri)
    gauc = resumed.result.metrics["test"]["gauc"]
    for wanted in (f"{gauc:.4f}", "log loss", "item repeat", str(again.model), "mlflow ui"):
        assert wanted in text


def test_what_a_killed_driver_left_out_of_mlflow_is_made_up_for(
    resumed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hashtab.pipelines import driver

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


def _killed(*_: object) -> None:
    raise KeyboardInterrupt
