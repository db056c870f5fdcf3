"""A tuning on a table compares trials on rows of their own, and ends in settings to train with."""

from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import polars as pl
import pytest
import yaml

from hashtab.features.errors import DataError
from hashtab.pipelines import table_training, tune
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.table_data import TableData, TableSettings, load
from hashtab.pipelines.table_graph import Estimator
from hashtab.pipelines.table_runs import TableTrainSettings
from hashtab.pipelines.table_tuning import TableSearchSpace, TableTuneSettings, part
from hashtab.pipelines.tune_table import tune as tune_table
from tests.pipelines.tables import SMALL_NETWORK, SMALL_TRAINING, settings_of

# MLflow and what it imports deprecate each other's names, which is none of our doing.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint:UserWarning"
)


@pytest.fixture
def settings(
    customers_file: Path, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TableTuneSettings:
    monkeypatch.chdir(tmp_path)  # where a database keeps its artifacts
    return TableTuneSettings(
        data=settings_of(customers_file).data,
        space=TableSearchSpace(width=(8, 12), mixer_width=(), bins=(), readout_width=()),
        network=SMALL_NETWORK,
        training=SMALL_TRAINING,
        trials=3,
        workers=0,
        storage=str(tmp_path / "runs"),
        tracking_uri=database,
    )


def test_a_tuning_ends_in_the_settings_of_its_best_trial(
    settings: TableTuneSettings, database: str
) -> None:
    tuning = tune_table(settings)
    assert tuning.trials[0].values["width"] == SMALL_NETWORK.width  # the settings as they are
    losses = [trial.result.loss or 0.0 for trial in tuning.ranking]
    assert losses == sorted(losses)
    assert len(losses) == 3
    best = yaml.safe_load(tuning.best_settings.read_text())
    for name, value in tuning.ranking[0].values.items():
        assert {**best["network"], **best["training"]}[name] == value
    assert best["data"]["target"] == "churned"
    assert (tuning.plots / "searched_settings.png").stat().st_size > 5000
    client = mlflow.MlflowClient(database)
    whole = client.get_run(tuning.tracked_as or "")
    assert whole.data.tags["best_trial"] == tuning.ranking[0].name
    nested = f"tags.mlflow.parentRunId = '{whole.info.run_id}'"
    trials = client.search_runs([whole.info.experiment_id], nested)
    assert sorted(r.data.metrics["best/validation/loss"] for r in trials) == pytest.approx(losses)


def test_trials_of_quantiles_are_compared_by_pinball_loss(settings: TableTuneSettings) -> None:
    data = replace(settings.data, target="spent", drop=("id", "churned"), quantiles=(0.1, 0.9))
    tuning = tune_table(replace(settings, data=data, trials=2))
    for trial in tuning.ranking:
        assert trial.result.loss == pytest.approx(trial.result.metrics["pinball_loss"])
    best = yaml.safe_load(tuning.best_settings.read_text())
    assert best["data"]["quantiles"] == [0.1, 0.9]


def test_a_trial_that_fails_ends_no_other_and_is_tried_again(
    settings: TableTuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, failing = table_training.fit, [True]

    def fails_once(chosen: TableTrainSettings, data: TableData) -> Estimator:
        if failing and chosen.training.learning_rate == SMALL_TRAINING.learning_rate:
            raise MemoryError("no room")
        return fit(chosen, data)

    monkeypatch.setattr(table_training, "fit", fails_once)
    settings = replace(settings, trials=2, space=TableSearchSpace(dropout=(), width=()))
    tuning = tune_table(settings)
    assert tuning.trials[0].result.failure == "MemoryError: no room"
    assert [trial.name for trial in tuning.ranking] == ["trial-02"]
    assert not tuning.published
    failing.clear()
    before = tuning.trials[1].result
    again = tune_table(replace(settings, resume=True))
    assert len(again.ranking) == 2
    assert again.trials[1].result == before
    assert again.published


def test_trials_never_see_the_rows_to_test_on(settings: TableTuneSettings) -> None:
    data = load(settings.data, 0)
    inner, held_out = part(data, 0)
    assert (len(inner.train), len(held_out), len(data.test)) == (76, 20, 24)
    seen = np.concatenate([inner.train.frame["age"], held_out.frame["age"]])
    assert sorted(seen[~np.isnan(seen)]) == sorted(data.train.frame["age"].drop_nulls())


def test_a_class_that_no_trial_would_learn_is_named(
    settings: TableTuneSettings, tmp_path: Path
) -> None:
    y = np.where(np.arange(100) < 55, np.arange(100) % 2, 2)
    frame = pl.DataFrame({"x": np.arange(100.0), "at": np.arange(100), "y": y})
    frame.write_csv(tmp_path / "t.csv")
    data = TableSettings(file=str(tmp_path / "t.csv"), target="y", time="at")
    load(data, 0)  # all rows to learn from are enough; what trials learn from are not
    with pytest.raises(DataError, match=r"classes \[2\] .* only in the latest rows"):
        tune_table(replace(settings, data=data))
    assert not (tmp_path / "runs").exists()


def test_the_first_word_chooses_what_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["tabnsa", "--space.width", "[0,8]"]) == 2
    assert "space.width must be positive" in capsys.readouterr().err
    assert tune.main(["tabnsa", "--trials", "2"]) == 2
    assert "--data.file must name a CSV or Parquet file" in capsys.readouterr().err
    nothing = TableSearchSpace(**dict.fromkeys(vars(TableSearchSpace()), ()))
    with pytest.raises(SettingsError, match="nothing to search"):
        TableTuneSettings(space=nothing)
