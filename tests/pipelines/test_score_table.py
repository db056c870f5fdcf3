"""Batch scores of a table: each row once, in order, whatever the form, kill or bundle."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hashtab.pipelines import score_table
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.score_table import ScoreTableSettings, score
from hashtab.pipelines.table_scoring import TableScoring
from hashtab.serving.errors import RequestError
from hashtab.serving.table_bundle import TableBundle
from tests.pipelines.tables import customers

ROWS = 50


@pytest.fixture
def settings(churn_bundle: Path, tmp_path: Path) -> ScoreTableSettings:
    customers(ROWS, seed=5).write_parquet(tmp_path / "rows.parquet")
    return ScoreTableSettings(
        bundle=str(churn_bundle),
        rows=str(tmp_path / "rows.parquet"),
        output=str(tmp_path / "scores"),
        keep=("id", "city"),
        rows_per_part=20,
    )


def scores(settings: ScoreTableSettings) -> pl.DataFrame:
    return pl.read_parquet(Path(settings.output) / "part-*.parquet")


def test_each_row_is_scored_once_in_order_with_what_is_kept(
    settings: ScoreTableSettings, churn_bundle: Path
) -> None:
    assert score(settings).rows == ROWS
    found, rows = scores(settings), customers(ROWS, seed=5)
    expected = TableBundle.open(churn_bundle).predict_proba(rows)
    assert found["row"].to_list() == list(range(ROWS))
    assert found["id"].to_list() == rows["id"].to_list()
    assert found["city"].to_list() == rows["city"].to_list()  # missing ones too
    probabilities = found["probability_no", "probability_yes"].to_numpy()
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert found["prediction"].to_list() == [["no", "yes"][i] for i in expected.argmax(1)]
    assert len(list(Path(settings.output).glob("part-*"))) == 3
    assert not list(Path(settings.output).glob("_requests*"))


def test_a_csv_is_scored_as_its_parquet(settings: ScoreTableSettings, tmp_path: Path) -> None:
    score(settings)
    rows = customers(ROWS, seed=5).with_columns(
        pl.col("member").replace_strict({True: "True", False: "False"}, return_dtype=pl.String)
    )
    rows.write_csv(tmp_path / "rows.csv")  # truth as Python writes it; a city is called 007
    csv = replace(settings, rows=str(tmp_path / "rows.csv"), output=str(tmp_path / "of_csv"))
    score(csv)
    assert scores(csv).equals(scores(settings))


def test_what_a_csv_calls_missing_is_missing(settings: ScoreTableSettings, tmp_path: Path) -> None:
    score(settings)
    rows = customers(ROWS, seed=5).cast(pl.String).fill_null("N/A")
    rows.write_csv(tmp_path / "rows.csv")
    csv = replace(settings, rows=str(tmp_path / "rows.csv"), output=str(tmp_path / "of_csv"))
    score(csv)
    assert scores(csv).equals(scores(settings))


def test_a_killed_scoring_does_what_is_left(
    settings: ScoreTableSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, done = TableScoring.score, list[int]()

    def killed(job: TableScoring, rows: pl.DataFrame, first: int) -> pl.DataFrame:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(first)
        return one(job, rows, first)

    monkeypatch.setattr(TableScoring, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        score(settings)
    done.clear()
    assert score(settings).rows == ROWS
    assert done == [40]
    assert scores(settings)["row"].to_list() == list(range(ROWS))


def test_no_row_gives_a_file_with_none(settings: ScoreTableSettings) -> None:
    customers(ROWS).head(0).write_parquet(settings.rows or "")
    assert score(settings).rows == 0
    assert scores(settings).columns[:2] == ["row", "id"]


def test_an_output_of_another_job_or_an_altered_one_is_refused(
    settings: ScoreTableSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    score(settings)
    with pytest.raises(SettingsError, match=r"another job: keep was .*'city'.*, now \('id',\)"):
        score(replace(settings, keep=("id",)))
    verify = ["--output", settings.output, "--verify"]
    assert score_table.main(verify) == 0
    part = min(Path(settings.output).glob("part-*"))
    shutil.copy(max(Path(settings.output).glob("part-*")), part)
    assert score_table.main(verify) == 2
    assert f"{part} was altered or damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keep": ("idd",)}, "no column 'idd', which --keep names; did you mean 'id'"),
        ({"rows": "nowhere/*.csv"}, "no rows in nowhere"),
        ({"bundle": None}, "--bundle and --rows must be given"),
    ],
)
def test_what_cannot_be_scored_is_named(
    change: dict[str, object], said: str, settings: ScoreTableSettings
) -> None:
    with pytest.raises((RequestError, SettingsError), match=said):
        score(replace(settings, **change))  # type: ignore[arg-type]


def test_a_missing_column_or_a_wrong_value_is_named(
    settings: ScoreTableSettings, tmp_path: Path
) -> None:
    rows = customers(ROWS)
    rows.drop("visits").write_parquet(settings.rows or "")
    with pytest.raises(RequestError, match="no column 'visits', which the model reads"):
        score(settings)
    rows.with_columns(age=pl.lit("old")).write_csv(tmp_path / "rows.csv")
    with pytest.raises(RequestError, match=r"cannot be read: .*old"):
        score(replace(settings, rows=str(tmp_path / "rows.csv")))
