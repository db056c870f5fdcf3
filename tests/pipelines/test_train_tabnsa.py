"""Training on a table: from a file to a bundle, an MLflow run and plots, or one line that helps."""

import json
import re
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import mlflow
import numpy as np
import polars as pl
import pytest
from sklearn.metrics import mean_pinball_loss

from hashtab.features.errors import DataError
from hashtab.models.tabular import TabNSAClassifier, TabNSARegressor
from hashtab.models.tabular.settings import NetworkSettings, TrainingSettings
from hashtab.pipelines import train_tabnsa
from hashtab.pipelines.command_line import SettingsError, flatten
from hashtab.pipelines.judging import judge_tables
from hashtab.pipelines.registry import CHALLENGER, Registry
from hashtab.pipelines.score_table import ScoreTableSettings, score
from hashtab.pipelines.table_data import TableSettings, labelled, load
from hashtab.pipelines.table_metrics import losses, metrics
from hashtab.pipelines.table_plots import contributions
from hashtab.pipelines.table_runs import TableRun, TableTrainSettings
from hashtab.pipelines.train_tabnsa import train
from hashtab.serving.table_bundle import TableBundle
from tests.pipelines.tables import SMALL_NETWORK, customers, settings_of

# MLflow and what it imports deprecate each other's names, which is none of our doing.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint:UserWarning"
)


@pytest.fixture(scope="module")
def settings(
    customers_file: Path, database: str, tmp_path_factory: pytest.TempPathFactory
) -> TableTrainSettings:
    folder = tmp_path_factory.mktemp("tabnsa")
    return replace(settings_of(customers_file), storage=str(folder / "runs"), tracking_uri=database)


@pytest.fixture(scope="module")
def run(settings: TableTrainSettings, tmp_path_factory: pytest.TempPathFactory) -> TableRun:
    """A finished training, registered as `customers`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("artifacts"))  # where a database keeps its artifacts
        return train(replace(settings, register="customers"))


def test_a_training_ends_in_a_bundle_that_predicts_as_it_was_tested(run: TableRun) -> None:
    result, bundle = run.result, TableBundle.open(run.bundle)
    held_out = pl.read_parquet(run.held_out)
    found = metrics(held_out["churned"].to_numpy(), bundle.predict_proba(held_out), bundle.labels)
    assert found == pytest.approx(result.metrics["test"], abs=1e-5)
    assert bundle.manifest.metrics == result.metrics
    assert bundle.manifest.parity.largest_difference < 1e-5
    assert bundle.manifest.classes == ("no", "yes")
    assert {c.name: c.values for c in bundle.manifest.columns} == {
        "age": "number",
        "city": "text",
        "member": "boolean",
        "plan": "integer",
        "visits": "number",
    }
    assert result.rows == {"train": 96, "test": 24}
    assert set(result.importances) == {column.name for column in bundle.manifest.columns}
    for name in ("calibration", "confusion", "explanations", "importances", "learning_curves"):
        assert (run.plots / f"{name}.png").stat().st_size > 5000


def test_explanations_of_two_classes_speak_for_the_second() -> None:
    frame = customers(300)
    rows = frame.select("age", "city", "member")
    estimator = TabNSAClassifier(**vars(SMALL_NETWORK), folds=1, max_epochs=30, random_state=0)
    estimator.fit(rows, frame["churned"])
    shares, towards = contributions(estimator, rows)
    assert towards == "yes"
    likely = estimator.predict_proba(rows)[:, 1]
    assert 0 < (likely > 0.5).sum() < len(likely)
    assert np.corrcoef(shares.sum_horizontal(), likely)[0, 1] > 0.9


def test_mlflow_knows_the_run(run: TableRun, database: str) -> None:
    client = mlflow.MlflowClient(database)
    told = client.get_run(run.tracked_as or "")
    assert told.info.status == "FINISHED"
    assert told.data.params["network.width"] == "8"
    assert told.data.params["data.target"] == "churned"
    assert told.data.metrics["best/test/auc"] == pytest.approx(run.result.metrics["test"]["auc"])
    history = client.get_metric_history(told.info.run_id, "fit/validation_loss")
    assert [metric.step for metric in history] == list(range(1, 1 + len(run.result.curves)))
    assert told.data.tags["mlflow.source.name"] == "pipelines/train_tabnsa.py"


def test_the_registered_model_predicts_in_mlflow(run: TableRun, database: str) -> None:
    registry = Registry(database, "customers")
    assert registry.aliases() == {CHALLENGER: 1}
    bundle = TableBundle.open(registry.download(1))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(database)
    try:
        model = mlflow.pyfunc.load_model("models:/customers@challenger")
    finally:
        mlflow.set_tracking_uri(before)
    example = bundle.example()
    found = model.predict(example)["probabilities"]
    np.testing.assert_array_equal(found, bundle.run(example))


def test_a_finished_training_is_shown_again_and_not_begun_twice(
    run: TableRun, settings: TableTrainSettings
) -> None:
    with pytest.raises(SettingsError, match=r"was finished before.*add --resume"):
        train(settings)
    before = run.bundle.stat().st_mtime_ns
    assert train(replace(settings, resume=True)).result == run.result
    assert run.bundle.stat().st_mtime_ns == before


def test_the_command_ends_with_where_all_lies_and_what_to_run_next(
    run: TableRun, settings: TableTrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"network": flatten(settings.network), "training": flatten(settings.training)}
    plain["data"] = {name: v for name, v in flatten(settings.data).items() if v is not None}
    (tmp_path / "my.yaml").write_text(json.dumps(plain))
    where = ["--storage", settings.storage, "--tracking_uri", settings.tracking_uri]
    assert train_tabnsa.main(["--config", str(tmp_path / "my.yaml"), *where, "--resume"]) == 0
    said = capsys.readouterr().out
    for words in ("96 rows of 5 columns", "AUC", str(run.bundle), "score_table.py --bundle"):
        assert words in said
    assert "promote.py" not in said


def test_the_rows_held_out_are_not_taken_for_unseen_by_the_champion(run: TableRun) -> None:
    registered = replace(run, settings=replace(run.settings, register="customers"))
    said = train_tabnsa.summary(registered)
    assert "labelled rows that neither has learnt from" in said
    (command,) = re.findall(r"promote\.py .*", said)
    assert str(run.held_out) not in command


@pytest.mark.parametrize("quantiles", [(0.1, 0.5, 0.9), (0.8,)])
def test_quantiles_come_from_the_command_to_the_scores(
    quantiles: tuple[float, ...],
    customers_file: Path,
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # where a database keeps its artifacts
    table = ["--data.file", str(customers_file), "--data.target", "spent"]
    small = ["--training.max_epochs", "8", "--training.folds", "2", "--tracking_uri", database]
    asked = ["--data.quantiles", str(list(quantiles)), "--data.drop", "[id,churned]"]
    assert train_tabnsa.main([*table, *small, *asked, "--run_name", "spent"]) == 0
    said = capsys.readouterr().out
    assert "pinball loss" in said
    run = tmp_path / "runs" / "spent"
    result = json.loads((run / "result.json").read_text())["metrics"]["test"]
    bundle, held_out = TableBundle.open(run / "bundle"), pl.read_parquet(run / "test.parquet")
    predicted, true = bundle.predict(held_out), held_out["spent"].to_numpy()
    assert bundle.manifest.quantiles == quantiles
    each = predicted.reshape(len(true), len(quantiles)).T
    pinball = [mean_pinball_loss(true, p, alpha=q) for p, q in zip(each, quantiles, strict=True)]
    assert result["pinball_loss"] == pytest.approx(np.mean(pinball), rel=1e-4)
    if len(quantiles) > 1:
        inside = (predicted[:, 0] <= true) & (true <= predicted[:, -1])
        assert result["coverage"] == inside.mean()
        assert (np.diff(predicted) >= 0).all()
    else:
        assert set(result) == {"pinball_loss"}
    rows = str(run / "test.parquet")
    score(ScoreTableSettings(bundle=str(run / "bundle"), rows=rows, output="scores"))
    scores = pl.read_parquet("scores/part-*.parquet")
    assert scores.columns == ["row", *(f"quantile_{q}" for q in quantiles)]
    np.testing.assert_array_equal(scores.drop("row").to_numpy().T, each)
    verdict = judge_tables(dict.fromkeys(("before", "after"), run / "bundle"), rows, 10, 0.95)
    assert verdict.comparison.gain.startswith("pinball loss")


def test_quantiles_that_cannot_be_predicted_are_named(tmp_path: Path) -> None:
    for wrong in ((0.5, 0.1), (0.0, 0.5), (0.5, 1.0), (0.5, 0.5)):
        with pytest.raises(SettingsError, match="quantiles must ascend between 0 and 1"):
            TableSettings(quantiles=wrong)
    frame().write_csv(tmp_path / "t.csv")
    settings = TableSettings(file=str(tmp_path / "t.csv"), target="y", quantiles=(0.5,))
    with pytest.raises(DataError, match=r"'y' of .* is taken for classes: give --data\.task"):
        load(settings, 0)
    assert load(replace(settings, task="regression"), 0).quantiles == (0.5,)


def test_settings_are_those_of_the_estimators() -> None:
    for kind in (TabNSAClassifier, TabNSARegressor):
        defaults = kind().get_params()
        own = vars(NetworkSettings()) | vars(TrainingSettings())
        assert {name: defaults[name] for name in own} == own


@pytest.mark.parametrize(
    ("target", "task"),
    [
        (["a", "b"] * 20, "classification"),
        ([True, False] * 20, "classification"),
        ([0, 1] * 20, "classification"),
        ([0.0, 1.0] * 20, "classification"),
        (list(range(40)), "regression"),
        ([0.5, 1.5] * 20, "regression"),
    ],
)
def test_the_task_is_told_by_the_target(tmp_path: Path, target: list[object], task: str) -> None:
    pl.DataFrame({"x": np.arange(40.0), "y": target}).write_parquet(tmp_path / "t.parquet")
    data = load(TableSettings(file=str(tmp_path / "t.parquet"), target="y"), 0)
    assert data.task == task
    assert (len(data.train), len(data.test)) == (32, 8)
    if task == "classification":
        assert {np.count_nonzero(data.test.target == label) for label in target} == {4}


def test_rows_are_held_out_by_time_or_by_a_file(tmp_path: Path) -> None:
    days = [date(2024, 1, 1) + timedelta(days=i // 2) for i in range(40)]
    frame = pl.DataFrame({"x": np.arange(40.0), "day": days, "y": [0, 1] * 20})
    frame.sample(fraction=1, shuffle=True, seed=0).write_csv(tmp_path / "t.csv")
    settings = TableSettings(file=str(tmp_path / "t.csv"), target="y", time="day")
    data = load(settings, 0)
    assert data.train.frame["x"].sort().to_list() == list(range(32))  # a day is not cut in two
    assert data.test.frame.columns == ["x"]
    frame.head(5).write_csv(tmp_path / "other.csv")
    other = load(replace(settings, time=None, drop=("day",), test=str(tmp_path / "other.csv")), 0)
    assert (len(other.train), len(other.test)) == (40, 5)
    assert other.digest != data.digest


def test_what_a_csv_calls_missing_leaves_numbers_numbers(tmp_path: Path) -> None:
    spelt = ["", '""', "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "null", "NULL", "?"]
    there = [f"{i},{['true', 'false'][i % 2]},None,{i % 2}" for i in range(40)]
    lines = ["x,b,t,y", *there, *(f"{s},{s},{s},1" for s in spelt)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = load(TableSettings(file=str(tmp_path / "t.csv"), target="y"), 0)
    assert [c.values for c in data.columns] == ["number", "boolean", "text"]
    frame = pl.concat([data.train.frame, data.test.frame])
    assert frame.null_count().row(0) == (11, 11, 11)
    assert set(frame["t"]) == {"None", None}


def test_a_file_that_moves_to_the_rows_to_test_on_makes_other_data(tmp_path: Path) -> None:
    for name in ("learn/a", "learn/b", "test/c"):
        path = tmp_path / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        pl.DataFrame({"x": np.arange(20.0), "y": [0, 1] * 10, "of": name}).write_csv(path)
    settings = TableSettings(file=f"{tmp_path}/learn", target="y", test=f"{tmp_path}/test")
    before = load(settings, 0)
    (tmp_path / "learn" / "b.csv").rename(tmp_path / "test" / "b.csv")
    assert load(settings, 0).digest != before.digest


def test_text_of_another_table_is_read_as_that_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("city,y\n" + "007,a\nx,b\n" * 10)
    (tmp_path / "other.csv").write_text("city,y\n007,a\n,b\n7,\n")
    data = load(TableSettings(file=str(tmp_path / "t.csv"), target="y"), 0)
    rows, said = labelled(str(tmp_path / "other.csv"), data.columns, "y", data.task)
    assert rows.frame["city"].to_list() == ["007", None]
    assert "1 rows of" in said[0]
    assert "have no 'y'" in said[0]


@pytest.mark.parametrize(
    ("first", "where"), [(90, "the rows to test on"), (70, "a training validates on")]
)
def test_a_class_that_only_the_latest_rows_have_is_named(
    first: int, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    y = np.where(np.arange(100) < first, np.arange(100) % 2, 2)
    pl.DataFrame({"x": np.arange(100.0), "at": np.arange(100), "y": y}).write_csv(
        tmp_path / "t.csv"
    )
    table = ["--data.file", str(tmp_path / "t.csv"), "--data.target", "y", "--data.time", "at"]
    assert train_tabnsa.main([*table, "--storage", str(tmp_path / "runs")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(rf"classes \[2\] .* only in .*{where}: leave .* --data\.time", line)
    assert not (tmp_path / "runs").exists()


def frame(**columns: object) -> pl.DataFrame:
    return pl.DataFrame({"x": np.arange(20.0), "y": [0, 1] * 10, **columns})


@pytest.mark.parametrize(
    ("table", "options", "said"),
    [
        (frame(), {"target": "z"}, "no column 'z' to predict.*--data.target"),
        (frame(y=[1] * 20), {}, "is 1 in all 16 rows"),
        (frame(y=[f"name {i}" for i in range(20)]), {}, "classes in .* rows"),
        (frame(y=["a", "b"] * 10), {"task": "regression"}, "a regression needs numbers"),
        (frame(day=[date(2024, 1, 1)] * 20), {}, r"'day' holds Date.*--data\.drop '\[day\]'"),
        (frame(tags=[["a"]] * 20), {}, r"'tags' holds List.*--data\.drop '\[tags\]'"),
        (frame(at=[None, *range(19)]), {"time": "at"}, r"1 rows have no 'at'.*leave them out"),
        (frame(at=[np.nan] * 3 + [1.0] * 17), {"time": "at"}, r"3 rows have no 'at'.*give them"),
        (frame(), {"drop": ("idd",)}, r"no column 'idd', which --data\.drop names"),
        (frame(), {"drop": ("x",)}, "no column but the target"),
        (frame().head(0), {}, "too few"),
        (frame().head(4), {}, "too few"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(
    table: pl.DataFrame, options: dict[str, str], said: str, tmp_path: Path
) -> None:
    table.write_parquet(tmp_path / "t.parquet")
    given = {"file": str(tmp_path / "t.parquet"), "target": "y", **options}
    with pytest.raises(DataError, match=said):
        load(TableSettings(**given), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "", "cannot be read"),
        ("t.xlsx", "PK", "neither CSV .* nor Parquet"),
        ("t.parquet", "no parquet", "cannot be read"),
        ("t.csv", "x,y\n", "too few"),
    ],
)
def test_a_file_that_is_no_table_ends_with_one_line(
    name: str, content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    places = ["--data.file", str(tmp_path / name), "--data.target", "y"]
    assert train_tabnsa.main([*places, "--storage", str(tmp_path / "runs")]) == 2
    assert not (tmp_path / "runs").exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert re.search(said, line)


def test_metrics_of_known_predictions() -> None:
    classes, target = np.array(["a", "b"]), np.array(["a", "b", "b", "a"])
    predicted = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]], np.float32)
    found = metrics(target, predicted, classes)
    assert found["auc"] == 1
    assert found["accuracy"] == 0.75
    assert found["log_loss"] == pytest.approx(losses(target, predicted, classes).mean())
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.7]).mean(), rel=1e-5)
    numbers = metrics(np.array([1.0, 3.0]), np.array([2.0, 3.0]), None)
    assert numbers == pytest.approx({"rmse": 0.5**0.5, "mae": 0.5, "r2": 0.5})
    assert "auc" not in metrics(target[:1], predicted[:1], classes)  # one class only
