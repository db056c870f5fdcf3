"""A bundle of a table exists only where onnxruntime and torch agree; the better one is promoted."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pytest
from onnx import helper, numpy_helper

from hashtab.features.errors import DataError
from hashtab.pipelines import export, promote, table_bundles
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.judging import judge_tables
from hashtab.pipelines.registry import CHALLENGER, CHAMPION, Registry, register
from hashtab.pipelines.table_bundles import export_table
from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import BundleManifest
from hashtab.serving.table_bundle import TableBundle, TableGolden
from hashtab.serving.table_manifest import TableManifest
from tests.pipelines.tables import customers, export_small, settings_of

# MLflow and what it imports deprecate each other's names, which is none of our doing.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint:UserWarning"
)


def blend(model: onnx.ModelProto, keep: float) -> onnx.ModelProto:
    """Draw the probabilities of a graph of two classes towards one half."""
    graph = model.graph
    for node in graph.node:
        node.output[:] = ["sure" if name == "probabilities" else name for name in node.output]
    for name, value in (("keep", keep), ("rest", (1 - keep) / 2)):
        graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    graph.node.append(helper.make_node("Mul", ["sure", "keep"], ["kept"]))
    graph.node.append(helper.make_node("Add", ["kept", "rest"], ["probabilities"]))
    return model


@pytest.fixture
def weaker(churn_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of the same columns and classes that hardly knows."""
    folder = shutil.copytree(churn_bundle, tmp_path / "weaker")
    model = blend(onnx.load(folder / "model.onnx"), 0.05)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    manifest = TableManifest.read(folder)
    inputs = TableGolden.read(folder / "golden.npz").inputs
    outputs = TableBundle(folder, manifest).run(inputs)
    TableGolden(inputs=inputs, outputs=outputs).write(folder / "golden.npz")
    replace(manifest, model_digest="another").write(folder)
    return folder


@pytest.fixture
def labelled_rows(tmp_path: Path) -> Path:
    customers(300, seed=6).write_csv(tmp_path / "labelled.csv")
    return tmp_path / "labelled.csv"


def test_an_export_that_differs_from_torch_leaves_nothing(
    churn_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = onnx.load(churn_bundle / "model.onnx")
    monkeypatch.setattr(table_bundles, "table_graph", lambda *_: blend(graph, 0.999))
    with pytest.raises(BundleError, match=r"differ by .* more than 1e-05: nothing was exported"):
        export_table(churn_bundle.parent / "model", tmp_path / "bundle", {})
    assert not list(tmp_path.iterdir())


def test_a_category_that_is_read_otherwise_is_met_by_the_gate(
    churn_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = onnx.load(churn_bundle / "model.onnx")
    encoder = next(node for node in graph.graph.node if node.op_type == "LabelEncoder")
    default = next(a for a in encoder.attribute if a.name == "default_int64")
    default.i = 1  # unseen is taken for missing
    monkeypatch.setattr(table_bundles, "table_graph", lambda *_: graph)
    with pytest.raises(BundleError, match=r"'city' missing, infinite, huge or unseen"):
        export_table(churn_bundle.parent / "model", tmp_path / "bundle", {})


def test_the_golden_batch_has_rows_of_the_whole_of_a_sorted_file(tmp_path: Path) -> None:
    customers().write_csv(tmp_path / "learn.csv")
    customers(1000, seed=1).sort("visits").write_csv(tmp_path / "test.csv")
    settings = settings_of(tmp_path / "learn.csv")
    data = replace(settings.data, test=str(tmp_path / "test.csv"))
    bundle = export_small(tmp_path / "run", replace(settings, data=data))
    numeric = TableGolden.read(bundle / "golden.npz").inputs["numeric"]
    visits = np.sort(customers(1000, seed=1)["visits"].to_numpy())
    assert len(numeric) == 256
    assert (numeric[0, 1], numeric[-1, 1]) == (visits[0], visits[-1])
    assert numeric[:, 1].mean() == pytest.approx(visits.mean(), rel=0.01)


def test_a_bundle_that_is_there_is_kept_and_another_not_overwritten(churn_bundle: Path) -> None:
    model = churn_bundle.parent / "model"
    assert export_table(model, churn_bundle, {}) == TableManifest.read(churn_bundle)
    with pytest.raises(SettingsError, match=r"table\.json is missing"):
        export_table(churn_bundle, churn_bundle, {})


def test_the_better_model_of_a_table_becomes_champion(
    churn_bundle: Path,
    weaker: Path,
    labelled_rows: Path,
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # where a database keeps its artifacts
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    registry = Registry(database, "tables")
    places = ["--name", "tables", "--tracking_uri", database, "--data", str(labelled_rows)]
    assert register(weaker, "tables", database, None) == 1
    assert promote.main(places) == 0
    assert register(churn_bundle, "tables", database, None) == 2
    assert promote.main(places) == 0
    assert registry.aliases()[CHAMPION] == 2
    said = capsys.readouterr().out
    assert "log loss of the champion less that of the challenger: +" in said
    assert "score_table.py --bundle models:/tables@champion" in said
    registry.set_alias(CHALLENGER, 1)
    assert promote.main(places) == 1
    assert registry.aliases()[CHAMPION] == 2


def test_models_that_cannot_be_compared_are_named(
    churn_bundle: Path, weaker: Path, tmp_path: Path
) -> None:
    customers(10).with_columns(churned=pl.lit("perhaps")).write_csv(tmp_path / "new.csv")
    both = {"champion": churn_bundle, "challenger": weaker}
    with pytest.raises(DataError, match=r"classes \['perhaps'\] that the models do not know"):
        judge_tables(both, str(tmp_path / "new.csv"), 10, 0.95)
    replace(TableManifest.read(weaker), target="stayed").write(weaker)
    with pytest.raises(SettingsError, match="they cannot be compared; --force promotes"):
        judge_tables(both, str(tmp_path / "new.csv"), 10, 0.95)


def test_export_of_a_run_needs_no_data(churn_bundle: Path, tmp_path: Path) -> None:
    run = shutil.copytree(churn_bundle.parent, tmp_path / "run")
    (run / "result.json").write_text('{"metrics": {"test": {"auc": 0.5}}}')
    (run / "run.json").write_text('{"mlflow_run_id": null}')
    settings = export.ExportSettings(run=str(run))
    exported = export.export(settings)
    assert exported.manifest.metrics == {"test": {"auc": 0.5}}
    assert not isinstance(exported.manifest, BundleManifest)
    said = export.report(settings, exported, 1.0)
    assert "classification of 'churned'" in said
    assert "score_table.py" in said
