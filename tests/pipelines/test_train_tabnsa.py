"""A table on its way from a file to scores: training, gate, bundle, registry, batch scores."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hashtab.pipelines import score_table, train_tabnsa
from hashtab.pipelines.registry import find_bundle
from hashtab.pipelines.table_bundles import export_table, load_estimator
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.table_bundle import TableBundle

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint:UserWarning"
)

ROWS = 160
QUICK = ("--training.folds=2", "--training.max_epochs=4", "--network.bins=4")


def churn(rows: int = ROWS) -> pl.DataFrame:
    """Customers as they come: numbers, text and truth values, some of them missing."""
    rng = np.random.default_rng(0)
    age, plan = rng.normal(40, 10, rows), rng.choice(["basic", "plus", "größer"], rows)
    gone = (age + 10 * (plan == "basic") + rng.normal(0, 5, rows)) > 45
    return pl.DataFrame(
        {
            "customer": [f"c{i}" for i in range(rows)],
            "age": pl.Series(age).set(pl.Series(rng.random(rows) < 0.1), None),
            "plan": pl.Series(plan).set(pl.Series(rng.random(rows) < 0.1), None),
            "abroad": rng.random(rows) < 0.2,
            "visits": rng.integers(0, 9, rows),
            "spent": 3 * age + rng.normal(0, 1, rows),
            "gone": pl.Series(gone).replace_strict({True: "yes", False: "no"}),
        }
    )


def run(folder: Path, *options: str, target: str = "gone") -> int:
    tracking = f"sqlite:///{folder / 'mlflow.db'}"
    return train_tabnsa.main(
        [
            f"--data.file={folder / 'churn.parquet'}",
            f"--data.target={target}",
            "--data.drop=[customer]",
            f"--storage={folder / 'runs'}",
            f"--tracking_uri={tracking}",
            *QUICK,
            *options,
        ]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one training has ended and its bundle is a registered model."""
    folder = tmp_path_factory.mktemp("tables")
    churn().write_parquet(folder / "churn.parquet")
    assert run(folder, "--run_name=first", "--register=churn") == 0
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> TableBundle:
    return TableBundle.open(folder / "runs" / "first" / "bundle")


def hard_rows() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "age": [None, np.inf, -np.inf, 1e30, 41.0],
            "plan": ["basic", None, "never seen", "plus", "größer"],
            "abroad": [True, None, False, True, True],
            "visits": [3, None, 0, -5, 10**9],
            "spent": [1.0, 2.0, None, np.nan, 5.0],
        }
    )


def test_a_bundle_scores_as_the_estimator_does(folder: Path, bundle: TableBundle) -> None:
    estimator = load_estimator(folder / "runs" / "first" / "model")
    for rows in (churn().drop("gone"), hard_rows()):
        served, expected = bundle.predict_proba(rows), estimator.predict_proba(rows)
        np.testing.assert_allclose(served, expected, atol=1e-5)
    assert bundle.manifest.parity.largest_difference <= 1e-5
    assert set(bundle.predict(hard_rows())) <= {"yes", "no"}


def test_rows_come_as_mappings_too_and_none_is_answered_by_none(bundle: TableBundle) -> None:
    row: dict[str, Any] = {"visits": 2, "plan": "plus", "age": 30, "abroad": False, "spent": None}
    alone = bundle.score([row])
    assert alone.shape == (1,)
    assert bundle.score(hard_rows().head(0)).shape == (0,)
    np.testing.assert_allclose(alone, bundle.score(pl.DataFrame([row])), atol=1e-6)


def test_a_row_without_a_column_is_refused_by_name(bundle: TableBundle) -> None:
    with pytest.raises(RequestError, match="plan"):
        bundle.score(hard_rows().drop("plan"))


def test_serving_needs_no_torch(bundle: TableBundle) -> None:
    code = (
        "import sys\n"
        "from hashtab.serving.table_bundle import TableBundle\n"
        f"bundle = TableBundle.open({str(bundle.folder)!r})\n"
        "bundle.score([{'age': 1, 'plan': 'x', 'abroad': True, 'visits': 1, 'spent': 2}])\n"
        "assert 'torch' not in sys.modules and 'mlflow' not in sys.modules\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_the_registry_names_the_bundle(folder: Path, bundle: TableBundle) -> None:
    found = find_bundle("models:/churn@challenger", f"sqlite:///{folder / 'mlflow.db'}")
    assert TableBundle.open(found).manifest.digest == bundle.manifest.digest


def test_a_finished_run_is_not_begun_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--run_name=first") == 2
    assert "--resume" in capsys.readouterr().err
    assert run(folder, "--run_name=first", "--resume") == 0, capsys.readouterr().err
    assert "AUC" in capsys.readouterr().out


def test_a_table_is_scored_row_by_row_once(folder: Path, bundle: TableBundle) -> None:
    output = folder / "scores"
    arguments = [
        f"--bundle={bundle.folder}",
        f"--rows={folder / 'churn.parquet'}",
        f"--output={output}",
        "--keep=[customer]",
        "--rows_per_part=50",
    ]
    assert score_table.main(arguments) == 0
    scores = pl.scan_parquet(output / "*.parquet").collect().sort("row")
    assert scores["customer"].to_list() == churn()["customer"].to_list()
    expected = bundle.predict_proba(churn())
    found = scores.select(pl.col("^.*yes.*$")).to_series().to_numpy()
    np.testing.assert_allclose(found, expected[:, list(bundle.labels).index("yes")], atol=1e-6)
    parts = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert score_table.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")} == parts


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_a_damaged_bundle_is_refused_by_the_files_name(
    bundle: TableBundle, tmp_path: Path, file: str
) -> None:
    for path in bundle.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-9])
    with pytest.raises(BundleError, match=file):
        TableBundle.open(tmp_path)


def test_nothing_is_exported_that_differs_from_torch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TableBundle.run
    monkeypatch.setattr(TableBundle, "run", lambda self, inputs: right(self, inputs) + 2e-5)
    with pytest.raises(BundleError, match="nothing was exported"):
        export_table(folder / "runs" / "first" / "model", tmp_path / "bundle", {})
    assert not (tmp_path / "bundle").exists()


def test_a_number_is_predicted(folder: Path) -> None:
    assert run(folder, "--run_name=number", target="spent") == 0
    bundle = TableBundle.open(folder / "runs" / "number" / "bundle")
    estimator = load_estimator(folder / "runs" / "number" / "model")
    rows = hard_rows().with_columns(gone=pl.Series(["yes", None, "no", "", "maybe"]))
    np.testing.assert_allclose(bundle.predict(rows), estimator.predict(rows), rtol=1e-5)
    assert bundle.manifest.task == "regression"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.drop("gone"), "gone"),
        (lambda t: t.with_columns(gone=pl.lit("yes")), "one"),
        (lambda t: t.head(0), "row"),
        (lambda t: t.with_columns(since=pl.date(2024, 1, 1)), "since"),
    ],
    ids=["no target", "one class", "no rows", "dates"],
)
def test_bad_tables_end_with_one_line(
    tmp_path: Path, change: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(churn()).write_parquet(tmp_path / "churn.parquet")
    assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert said in error
    assert not (tmp_path / "runs").exists()
