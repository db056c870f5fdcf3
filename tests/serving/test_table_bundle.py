"""A bundle of a table: raw rows of any form in, the estimator's predictions out, or an error."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import polars as pl
import pytest

from hashtab.models.tabular.table import Frame, Table
from hashtab.pipelines.table_bundles import load_estimator
from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.opening import open_any
from hashtab.serving.table_bundle import TableBundle, TableGolden
from hashtab.serving.table_columns import texts
from hashtab.serving.table_manifest import TableManifest
from tests.pipelines.tables import customers

ROOT = Path(__file__).resolve().parents[2]
READ = ["age", "city", "member", "plan", "visits"]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def bundle(churn_bundle: Path) -> TableBundle:
    return TableBundle.open(churn_bundle)


@pytest.fixture
def copy(churn_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return shutil.copytree(churn_bundle, tmp_path / "bundle")


def test_rows_of_any_form_give_the_estimators_probabilities(
    bundle: TableBundle, churn_bundle: Path
) -> None:
    frame = customers(40, seed=1).select(READ)
    expected = load_estimator(churn_bundle.parent / "model").predict_proba(frame)
    plain = [list(row) for row in frame.rows()]
    forms: list[Any] = [
        frame,
        frame.to_dicts(),
        frame.to_dict(as_series=False),
        {name: frame[name].to_numpy() for name in READ},
        np.array(plain, dtype=object),
        frame.with_columns(pl.col("plan").cast(pl.Float64)),  # as pandas has it
    ]
    for rows in forms:
        np.testing.assert_allclose(bundle.predict_proba(rows), expected, atol=CLOSE)
    np.testing.assert_allclose(bundle.score(frame), expected[:, 1], atol=CLOSE)
    assert bundle.predict(frame).tolist() == [["no", "yes"][i] for i in expected.argmax(1)]


def test_a_frame_of_pandas_is_read_as_one_of_polars(bundle: TableBundle) -> None:
    rows = customers(40, seed=1).select(READ)
    rows[0, "city"], rows[1, "city"], rows[2, "age"] = "Atlantis", None, float("nan")
    plain = pd.DataFrame(rows.to_dict(as_series=False))  # NaN and object
    names = {"age": "Float64", "member": "boolean", "plan": "Int64", "visits": "Int32"}
    nullable = plain.astype({**names, "city": "string"})  # pd.NA
    levels = plain.astype({"city": "category", "plan": "category", "visits": "object"})
    shuffled = nullable[READ[::-1]].set_index(pd.Index(range(100, 140)))
    expected = bundle.predict_proba(rows)
    for frame in (plain, nullable, levels, shuffled):
        np.testing.assert_array_equal(bundle.predict_proba(frame), expected)
        columns = {name: frame[name] for name in READ}
        np.testing.assert_array_equal(bundle.predict_proba(columns), expected)
        records: Any = frame.to_dict("records")
        np.testing.assert_array_equal(bundle.predict_proba(records), expected)
        assert bundle.predict_proba(frame[:0]).shape == (0, 2)


def test_a_frame_that_cannot_be_scored_is_named(bundle: TableBundle) -> None:
    frame = pd.DataFrame(customers(3).select(READ).to_dict(as_series=False))
    others: list[Any] = [None, iter([{}]), frame["age"], pl.DataFrame(frame).lazy()]
    for other in others:
        with pytest.raises(RequestError, match=r"rows must be a list of mappings, .* got a "):
            bundle.predict_proba(other)
    with pytest.raises(RequestError, match=r"'.*' is one value: give a row as \[row\]"):
        bundle.predict_proba(customers(1).select(READ).to_dicts()[0])
    with pytest.raises(RequestError, match="the table has more than one column 'age'"):
        bundle.predict_proba(pd.concat([frame, frame[["age"]]], axis=1))
    with pytest.raises(RequestError, match="the table has no column 'age'"):
        bundle.predict_proba(frame.drop(columns="age"))
    for value in ("old", pd.Timestamp("2024-01-01")):
        with pytest.raises(RequestError, match="column 'age' must hold numbers, got"):
            bundle.predict_proba(frame.assign(age=value))
        with pytest.raises(RequestError, match="column 'age' must hold numbers, got"):
            bundle.predict_proba(pl.DataFrame(frame.assign(age=value).to_dict("list")))


@pytest.mark.parametrize(
    "value",
    [
        *(True, False, 1, 0, 1.0, 0.5, 1e30, "1", "True", "true", b"Bonn", ""),
        *(np.True_, np.int64(1), np.float64(1.0), np.float32(0.1)),
        *(b"", None, float("nan"), pd.NA, pd.NaT),
    ],
)
def test_a_category_is_called_as_the_estimators_call_it(value: object) -> None:
    frame = Frame(pd.DataFrame({"a": pd.Series([value, "other"], dtype=object)}), None)
    _, categories = Table.of(frame, ["a"]).values(frame)
    assert texts("a", [value, "other"]) == [categories[0, 0] or "", "other"]


def test_truth_is_no_number_among_categories() -> None:
    assert len(set(texts("a", [True, 1, "other"]))) == 3
    assert len(set(texts("a", [1, 1.0, "1"]))) == 1


def test_the_number_of_rows_changes_no_prediction(bundle: TableBundle) -> None:
    frame = customers(2500, seed=2)
    whole = bundle.predict_proba(frame)
    assert whole.shape == (2500, 2)
    for rows in (slice(0, 0), slice(0, 1), slice(1000, 1100)):
        np.testing.assert_allclose(bundle.predict_proba(frame[rows]), whole[rows], atol=CLOSE)
    assert bundle.predict_proba(customers(0).select(READ)).shape == (0, 2)


def test_missing_unseen_and_infinite_values_are_scored_as_the_estimator_does(
    bundle: TableBundle, churn_bundle: Path
) -> None:
    row = {"age": 40.0, "city": "Bonn", "member": True, "plan": 2, "visits": 3}
    hard = [
        {**row, "city": "Atlantis"},
        {**row, "city": None},
        {**row, "city": ""},
        {**row, "age": None},
        {**row, "age": float("nan")},
        {**row, "age": float("-inf")},
        dict.fromkeys(READ),
    ]
    found = bundle.predict_proba(hard)
    expected = load_estimator(churn_bundle.parent / "model").predict_proba(pl.DataFrame(hard))
    np.testing.assert_allclose(found, expected, atol=CLOSE)
    assert found[1].tolist() == found[2].tolist()  # both are missing
    assert found[3].tolist() == found[4].tolist()
    assert found[0].tolist() != found[1].tolist()  # unseen is not missing


def test_a_regression_gives_one_number_a_row(spent_bundle: Path) -> None:
    bundle, frame = TableBundle.open(spent_bundle), customers(30, seed=3).select(READ)
    expected = load_estimator(spent_bundle.parent / "model").predict(frame)
    np.testing.assert_allclose(bundle.predict(frame), expected, rtol=1e-5)
    assert bundle.score(frame[:0]).shape == (0,)
    with pytest.raises(RequestError, match="predicts a number, and no probabilities"):
        bundle.predict_proba(frame)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"age": 1, "city": "a", "member": True, "plan": 1}], "row 0 has no column 'visits'"),
        ({"agee": [1.0]}, "no column 'age', which the model reads; did you mean 'agee'"),
        (np.zeros((2, 3)), r"must be \[N, 5\], got \(2, 3\)"),
        (
            [{"age": "old", "city": "a", "member": True, "plan": 1, "visits": 1}],
            "column 'age' must hold numbers, got 'old'",
        ),
        (
            [{"age": 1, "city": ["a"], "member": True, "plan": 1, "visits": 1}],
            "column 'city' must hold text, numbers or truth values, got list",
        ),
        (
            {"age": [1, 2], "city": ["a"], "member": [True], "plan": [1], "visits": [1]},
            "must be of one length",
        ),
    ],
)
def test_rows_that_cannot_be_scored_are_named(bundle: TableBundle, rows: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        bundle.predict_proba(rows)


def test_it_is_served_without_torch(churn_bundle: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'sklearn', 'ray', 'mlflow', 'onnx', 'pandas'):\n"
        "    sys.modules[name] = None\n"
        "from hashtab.serving.table_bundle import TableBundle\n"
        f"bundle = TableBundle.open({str(churn_bundle)!r})\n"
        f"print(bundle.score([dict.fromkeys({READ!r})]))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_graph_alone_says_what_it_reads(churn_bundle: Path) -> None:
    graph = onnx.load(churn_bundle / "model.onnx")
    said = {entry.key: entry.value for entry in graph.metadata_props}
    assert [column["name"] for column in json.loads(said["columns"])] == READ
    assert json.loads(said["classes"]) == ["no", "yes"]
    assert said["target"] == "churned"
    assert [tensor.name for tensor in graph.graph.input] == ["numeric", "categorical"]
    assert [tensor.name for tensor in graph.graph.output] == ["probabilities"]


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_an_altered_file_is_refused(name: str, copy: Path) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} is not the file .*export the model again"):
        TableBundle.open(copy)


def test_predictions_that_this_machine_computes_otherwise_are_refused(copy: Path) -> None:
    golden = TableGolden.read(copy / "golden.npz")
    replace(golden, outputs=golden.outputs + np.float32(3e-4)).write(copy / "golden.npz")
    TableManifest.read(copy).write(copy)
    with pytest.raises(BundleError, match=r"model\.onnx scores its golden batch 0\.0003 apart"):
        TableBundle.open(copy)


def test_a_bundle_is_opened_by_its_kind(churn_bundle: Path, copy: Path) -> None:
    assert isinstance(open_any(churn_bundle), TableBundle)
    with pytest.raises(BundleError, match=r"of kind 'table', .*score_table\.py scores it"):
        Bundle.open(churn_bundle)
    plain = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(plain | {"kind": "clicks"}))
    with pytest.raises(BundleError, match=r"of kind 'clicks', .*score_batch\.py scores it"):
        TableBundle.open(copy)
    (copy / "manifest.json").write_text(json.dumps(plain | {"kind": "poem"}))
    with pytest.raises(BundleError, match="of kind 'poem'; known: clicks, table"):
        open_any(copy)
