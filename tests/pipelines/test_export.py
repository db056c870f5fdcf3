"""Export: graphs that score as torch does, behind a gate that leaves nothing where they do not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper

from hashtab.features.dataset import Dataset
from hashtab.models.ctr import ClickModel, ClickModelSettings, FeatureSpec
from hashtab.pipelines import bundles, export
from hashtab.pipelines.bundles import check_servable, export_model, fingerprint
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.graph_parts import part_of
from hashtab.pipelines.parity import Case, cases, check_parity, check_table, torch_scores
from hashtab.pipelines.saved_model import load_model, save_model
from hashtab.serving.bundle import Bundle, Candidates, Float32
from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import BundleManifest
from hashtab.serving.scorer.champion import Served
from hashtab.serving.store import UserRecord
from tests.pipelines.bundles import HISTORY_LIMIT, WINDOW, export_bundle, small_model
from tests.tolerances import TOLERANCE

CLOSE = TOLERANCE[torch.float32]
ENCODERS = ("sdim", "long_short", "mean", "none", "din", "full")
METRICS = {"validation": {"gauc": 0.5}}
INT32, INT64, FLOAT, BOOL = (
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.FLOAT,
    TensorProto.BOOL,
)


@pytest.fixture(scope="module")
def full_bundle(likes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exact attention to the latest 12 behaviours; on `likes`."""
    dataset = Dataset.open(likes)
    model = small_model(dataset, "full_target_attention")
    return export_bundle(tmp_path_factory.mktemp("full") / "full-run", model, dataset)


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    """The bundle of the encoder that a test is parametrised with."""
    found: Path = request.getfixturevalue(f"{request.param}_bundle")
    return found


each_bundle = pytest.mark.parametrize("folder", ENCODERS, indirect=True)


def graphs_of(folder: Path) -> dict[str, ModelProto]:
    return {path.stem: onnx.load(path) for path in sorted(folder.glob("*.onnx"))}


def random_case(bundle: Bundle, length: int, count: int) -> Case:
    rng = np.random.default_rng(length)
    features = bundle.manifest.features

    def ids(role: str, rows: int) -> dict[str, np.ndarray]:
        return {f.name: rng.integers(1, f.size, rows, np.int32) for f in getattr(features, role)}

    counters = rng.random((count, len(features.counters))).astype(np.float32)
    return Case(
        name="random",
        behaviours=ids("behaviour", length),
        candidates=Candidates(
            features=ids("candidate", count), context=ids("context", count), counters=counters
        ),
    )


@each_bundle
def test_a_bundle_scores_as_its_model_does(folder: Path) -> None:
    bundle, model = Bundle.open(folder), load_model(folder.parent / "model")
    lengths = (0, 1, WINDOW, WINDOW + 1, HISTORY_LIMIT, HISTORY_LIMIT + 1, 300)
    for length, count in zip(lengths, (1, 2, 3, 50, 7, 400, 1), strict=True):
        case = random_case(bundle, length, count)
        record = bundle.record(case.behaviours, np.arange(length), np.full(length, -1))
        found = bundle.score(record, case.candidates)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, torch_scores(model, case), **CLOSE)
        if length:
            other = bundle.score(UserRecord.empty(bundle.layout), case.candidates)
            assert np.allclose(found, other, **CLOSE) == (bundle.manifest.encoder == "none")


@each_bundle
def test_the_scorers_two_halves_give_the_scores_of_the_whole_bit_for_bit(folder: Path) -> None:
    bundle = Bundle.open(folder)
    for length, count in ((0, 1), (1, 2), (WINDOW, 3), (HISTORY_LIMIT, 64), (300, 1), (300, 499)):
        case = random_case(bundle, length, count)
        record = bundle.record(case.behaviours, np.arange(length), np.full(length, -1))
        asked = case.candidates
        parts = bundle.item_parts(asked.features)
        online = bundle.score_items(record, parts, asked.context, asked.counters)
        assert online.tobytes() == bundle.score(record, asked).tobytes()


@each_bundle
def test_the_items_of_a_catalogue_score_online_as_in_a_batch(folder: Path) -> None:
    served = Served.open(folder)
    bundle, rng = served.bundle, np.random.default_rng(0)
    items, names = len(bundle.catalogue), [f.name for f in bundle.manifest.features.candidate]
    met = rng.integers(-1, items, 30)
    known = bundle.record(bundle.catalogue.columns(met, names), np.arange(30), met)
    for count, record in ((1, known), (2, known), (300, known), (300, served.empty)):
        rows = rng.integers(-1, items, count)
        context = served.context.encode({}, None, count).columns
        candidates = Candidates(
            features=bundle.catalogue.columns(rows, names),
            context=context,
            counters=bundle.counters(record, rows),
        )
        expected = bundle.score(record, candidates)
        assert served.score(record, rows, context).tobytes() == expected.tobytes()


@each_bundle
def test_the_gates_figures_are_in_the_manifest(folder: Path, likes: Path) -> None:
    manifest, dataset = BundleManifest.read(folder), Dataset.open(likes)
    examples = cases(dataset, load_model(folder.parent / "model"))
    assert manifest.parity.requests == len(examples)
    assert manifest.parity.scores == sum(len(case.candidates.counters) for case in examples)
    assert manifest.parity.largest_difference < CLOSE["atol"]
    behaviours = sum(len(case.behaviours["item"]) for case in examples)
    items = dataset.manifest.items + 1  # and the unknown one
    assert manifest.parity.codes == (behaviours + items) * manifest.table.groups
    assert manifest.data_digest == dataset.manifest.digest
    assert manifest.run == folder.parent.name


def test_a_bundle_without_a_table_encodes_nothing(din_bundle: Path) -> None:
    bundle = Bundle.open(din_bundle)
    assert not (din_bundle / "encoder.onnx").exists()
    with pytest.raises(BundleError, match="encoder 'din' keeps no table"):
        bundle.encode(random_case(bundle, 3, 1).behaviours)


def signature(values: "list[onnx.ValueInfoProto]") -> dict[str, tuple[int, tuple[str | int, ...]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for value in values
    }


@each_bundle
def test_inputs_and_outputs_have_their_names_types_and_free_sizes(folder: Path) -> None:
    manifest, graphs = BundleManifest.read(folder), graphs_of(folder)
    table = manifest.table
    shape = table.groups, table.buckets, table.size
    candidates = ("users", "candidates")
    expected: dict[str, tuple[int, tuple[str | int, ...]]] = {
        "candidate.item": (INT32, candidates),
        "candidate.kind": (INT32, candidates),
        "context.weekday": (INT32, candidates),
    }
    if manifest.features.counters:
        expected["counters"] = FLOAT, (*candidates, 2)
    if table.groups:
        expected["table"] = INT32, ("users", *shape)
    if manifest.counts_behaviours:
        expected["behaviours"] = INT64, ("users",)
    if manifest.recent:
        expected["recent_lengths"] = INT64, ("users",)
        expected |= {f"recent.{name}": (INT32, ("users", "recent")) for name in ("item", "kind")}
    assert signature(graphs["scorer"].graph.input) == expected
    assert signature(graphs["scorer"].graph.output) == {"scores": (FLOAT, candidates)}
    parts = {"item.vector": (FLOAT, (*candidates, table.size))}
    if "sdim" in manifest.encoder:
        parts["item.buckets"] = INT32, (*candidates, table.groups)
    features = {name: value for name, value in expected.items() if name.startswith("candidate.")}
    others = {name: value for name, value in expected.items() if name not in features}
    assert signature(graphs["items"].graph.input) == features
    assert signature(graphs["items"].graph.output) == parts
    assert signature(graphs["online"].graph.input) == others | parts
    assert signature(graphs["online"].graph.output) == {"scores": (FLOAT, candidates)}
    if table.groups:
        behaviours = ("users", "length")
        assert signature(graphs["encoder"].graph.input) == {
            f"behaviour.{name}": (INT32, behaviours) for name in ("item", "kind")
        }
        assert signature(graphs["encoder"].graph.output) == {
            "increments": (INT32, ("users", *shape)),
            "codes": (INT32, (*behaviours, table.groups)),
            "vectors": (INT32, (*behaviours, table.size)),
        }


@each_bundle
def test_graphs_are_of_float32_and_integers_without_loops_or_data_dependent_shapes(
    folder: Path,
) -> None:
    for model in graphs_of(folder).values():
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        values = [*graph.value_info, *graph.input, *graph.output]
        types = {value.type.tensor_type.elem_type for value in values}
        types |= {tensor.data_type for tensor in graph.initializer}
        types |= {a.i for n in graph.node if n.op_type == "Cast" for a in n.attribute}
        assert types <= {FLOAT, INT32, INT64, BOOL}
        operators = {node.op_type for node in graph.node}
        assert not operators & {"Loop", "Scan", "If", "NonZero", "ScatterElements"}
        assert {node.domain for node in graph.node} == {""}


def ancestors(model: ModelProto) -> dict[str, set[str]]:
    """Each value's inputs of the graph, all that it is computed from."""
    found = {value.name: {value.name} for value in model.graph.input}
    for node in model.graph.node:
        above = set[str]().union(*(found.get(name, set()) for name in node.input))
        found |= dict.fromkeys(node.output, above)
    return found


@pytest.mark.parametrize(
    ("folder", "operator", "read"),
    [
        ("sdim", "ReduceL2", {"table"}),  # a table's rows are normalised
        ("long_short", "ReduceL2", {"table"}),
        ("long_short", "MatMul", {"recent.item", "recent.kind"}),  # keys of the latest behaviours
        ("full", "MatMul", {"recent.item", "recent.kind"}),
        ("din", "MatMul", {"recent.item", "recent.kind"}),
        ("mean", "Div", {"table", "behaviours"}),
    ],
    indirect=["folder"],
)
def test_a_users_part_is_computed_once_and_not_per_candidate(
    folder: Path, operator: str, read: set[str]
) -> None:
    for name in ("scorer", "online"):
        scorer = graphs_of(folder)[name]
        above = ancestors(scorer)
        nodes = [node for node in scorer.graph.node if node.op_type == operator]
        assert [node for node in nodes if above[node.output[0]] == read]


def test_a_part_of_a_graph_that_needs_more_than_it_is_given_is_not_made(sdim_bundle: Path) -> None:
    with pytest.raises(ValueError, match=r"\['scores'\] are computed from \['candidate"):
        part_of(graphs_of(sdim_bundle)["scorer"], ["table", "context.weekday"], ["scores"])


@pytest.mark.parametrize("folder", ["sdim", "long_short"], indirect=True)
def test_all_graphs_read_one_copy_of_embeddings_and_planes(folder: Path) -> None:
    places: dict[str, set[tuple[str, ...]]] = {}
    for name in ("encoder", "scorer", "items", "online"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            shared = tensor.name.removeprefix("model.")
            place = tuple(entry.value for entry in tensor.external_data)
            places.setdefault(shared, set()).add(place)
    (item,) = places["objects.tables.0.weight"]
    assert item[0] == "weights.bin"
    assert len(places["head.0.weight"]) == 1
    prefix = "encoder.long." if "long" in folder.parent.name else "encoder."
    assert len(places[f"{prefix}planes"]) == 1


class Graphs:
    """The graphs of a bundle in place of torch's export, which takes seconds; one may be edited."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs = graphs_of(folder)
        self.exports = 0
        scoring = ("scorer", "items", "online")

        monkeypatch.setattr(bundles, "scorer_graphs", lambda _: {n: self.give(n) for n in scoring})
        monkeypatch.setattr(bundles, "encoder_graph", lambda _: self.give("encoder"))

    def give(self, name: str) -> ModelProto:
        self.exports += 1
        copied = ModelProto()
        copied.CopyFrom(self.graphs[name])
        return copied

    def edit(self, name: str, weight: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        (tensor,) = (t for t in self.graphs[name].graph.initializer if t.name == weight)
        array = np.array(numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(change(array).astype(array.dtype), weight))


@pytest.fixture
def graphs(sdim_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Graphs:
    return Graphs(sdim_bundle, monkeypatch)


@pytest.fixture
def model_folder(sdim_bundle: Path) -> Path:
    return sdim_bundle.parent / "model"


def test_a_rounding_error_passes_the_gate_and_is_noted(
    graphs: Graphs, model_folder: Path, dataset: Dataset, tmp_path: Path
) -> None:
    for name in ("scorer", "online"):
        graphs.edit(name, "model.output.bias", lambda bias: bias + 1e-4)
    manifest = export_model(model_folder, dataset, tmp_path / "bundle", METRICS)
    assert 1e-5 < manifest.parity.largest_difference < 1e-4
    assert Bundle.open(tmp_path / "bundle").manifest == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def off_by_one(array: np.ndarray) -> np.ndarray:
    return array + 1e-3


def other_sign_of_a_plane(planes: np.ndarray) -> np.ndarray:
    return planes * np.where(np.arange(planes.shape[1]) == 3, -1, 1)


def by_a_rounding(array: np.ndarray) -> np.ndarray:
    return array + 1e-5


def not_a_number(array: np.ndarray) -> np.ndarray:
    return array * np.nan


@pytest.mark.parametrize(
    ("graph", "weight", "change", "message"),
    [
        ("scorer", "model.output.bias", off_by_one, r"differ by 0\.000\d+ in the score"),
        ("scorer", "model.output.bias", not_a_number, "differ by nan in the score"),
        ("scorer", "model.encoder.planes", other_sign_of_a_plane, r"differ by .* in the score"),
        (
            "items",
            "model.objects.tables.0.weight",
            by_a_rounding,
            "two halves differ from the whole",
        ),
        (
            "items",
            "model.encoder.planes",
            other_sign_of_a_plane,
            "two halves differ from the whole",
        ),
        ("online", "model.output.bias", by_a_rounding, "two halves differ from the whole"),
        ("encoder", "encoder.planes", other_sign_of_a_plane, r"hash \d+ of \d+ behaviours"),
        ("encoder", "objects.tables.0.weight", np.negative, r"hash \d+ of \d+ behaviours"),
    ],
)
def test_the_gate_refuses_a_graph_with_another_weight_and_leaves_nothing(
    graph: str,
    weight: str,
    change: Callable[[np.ndarray], np.ndarray],
    message: str,
    graphs: Graphs,
    model_folder: Path,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    graphs.edit(graph, weight, change)
    with pytest.raises(BundleError, match=message) as caught:
        export_model(model_folder, dataset, tmp_path / "bundle", METRICS)
    assert "nothing was exported" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_gate_refuses_tables_that_are_not_the_sum_of_their_behaviours(
    sdim_bundle: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sdim_bundle, tmp_path / "bundle")
    encoder = onnx.load(folder / "encoder.onnx", load_external_data=False)
    (scatter,) = (node for node in encoder.graph.node if node.op_type == "ScatterND")
    del scatter.attribute[:]  # the last behaviour of a bucket in place of the sum of them all
    (folder / "encoder.onnx").write_bytes(encoder.SerializeToString())
    wrong = Bundle(folder, BundleManifest.read(folder))
    behaviours = random_case(wrong, 40, 1).behaviours
    check_table(Bundle.open(sdim_bundle), behaviours, "here")
    with pytest.raises(BundleError, match=r"not the sum of its behaviours \(here\): nothing was"):
        check_table(wrong, behaviours, "here")


def test_a_model_too_large_for_the_fixed_point_of_tables_is_not_exported(
    graphs: Graphs, model_folder: Path, dataset: Dataset, tmp_path: Path
) -> None:
    model = load_model(model_folder)
    model.state_dict()["objects.tables.0.weight"].mul_(1e4)
    save_model(tmp_path / "model", model, dataset.manifest)
    for graph, weight in (("scorer", "model.objects"), ("encoder", "objects")):
        graphs.edit(graph, f"{weight}.tables.0.weight", lambda table: table * 1e4)
    with pytest.raises(BundleError, match=r"which no table holds.*request\): nothing was exported"):
        export_model(tmp_path / "model", dataset, tmp_path / "bundle", METRICS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_that_fails_half_way_leaves_nothing(
    graphs: Graphs, model_folder: Path, dataset: Dataset, tmp_path: Path
) -> None:
    graphs.graphs["encoder"].graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(BundleError, match=r"encoder\.onnx cannot be loaded by onnxruntime"):
        export_model(model_folder, dataset, tmp_path / "bundle", METRICS)
    assert list(tmp_path.iterdir()) == []


class Wrong(Bundle):
    """A bundle that scores some requests wrong."""

    def __init__(self, folder: Path, when: Callable[[UserRecord, Candidates], bool]) -> None:
        super().__init__(folder, BundleManifest.read(folder))
        self.when = when

    def score(self, record: UserRecord, candidates: Candidates) -> Float32:
        return super().score(record, candidates) + np.float32(self.when(record, candidates)) / 999


HARD: dict[str, Callable[[UserRecord, Candidates], bool]] = {
    "empty history": lambda record, _: record.behaviours == 0,
    "one candidate": lambda _, candidates: len(candidates.counters) == 1,
    "2,000 candidates": lambda _, candidates: len(candidates.counters) == 2000,
    "unknown candidates": lambda _, candidates: bool((candidates.features["item"] == 1).all()),
    "unknown behaviours": lambda record, _: bool((record.table == 0).all() and record.behaviours),
}


@pytest.mark.parametrize("name", HARD)
def test_the_gate_meets_each_hard_request(name: str, sdim_bundle: Path, dataset: Dataset) -> None:
    model = load_model(sdim_bundle.parent / "model")
    hard = [case for case in cases(dataset, model) if case.name == name]
    with pytest.raises(BundleError, match=name):
        check_parity(model, Wrong(sdim_bundle, HARD[name]), hard)
    check_parity(model, Wrong(sdim_bundle, lambda *_: False), hard)


def test_the_gate_meets_real_requests_and_the_longest_history_of_all(
    sdim_bundle: Path, dataset: Dataset
) -> None:
    examples = cases(dataset, load_model(sdim_bundle.parent / "model"))
    real = [case for case in examples if case.name == "validation request"]
    assert len(real) > 64
    assert len({len(case.behaviours["item"]) for case in real}) > 10
    (longest,) = (case for case in examples if case.name == "longest history")
    lengths = [np.diff(batch.history_offsets).max() for batch in dataset.batches("test")]
    assert len(longest.behaviours["item"]) >= max(lengths)
    assert len(longest.behaviours["item"]) >= max(len(c.behaviours["item"]) for c in real)


def test_to_export_again_does_nothing(
    graphs: Graphs, model_folder: Path, dataset: Dataset, tmp_path: Path
) -> None:
    first = export_model(model_folder, dataset, tmp_path / "bundle", METRICS)
    exports, written = graphs.exports, [p.stat().st_mtime_ns for p in tmp_path.rglob("*")]
    assert export_model(model_folder, dataset, tmp_path / "bundle", METRICS) == first
    assert graphs.exports == exports
    assert [path.stat().st_mtime_ns for path in tmp_path.rglob("*")] == written


def test_an_empty_folder_and_what_a_kill_left_are_in_nobodys_way(
    graphs: Graphs, model_folder: Path, dataset: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    left = tmp_path / ".bundle.tmp"
    left.mkdir()
    (left / "scorer.onnx").write_bytes(b"half")
    export_model(model_folder, dataset, tmp_path / "bundle", METRICS)
    Bundle.open(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_another_model_never_replaces_a_bundle(
    sdim_bundle: Path, none_bundle: Path, dataset: Dataset
) -> None:
    before = BundleManifest.read(sdim_bundle)
    with pytest.raises(SettingsError, match="holds another model; choose another --output"):
        export_model(none_bundle.parent / "model", dataset, sdim_bundle, METRICS)
    assert Bundle.open(sdim_bundle).manifest == before


def test_the_same_weights_with_another_limit_are_another_model(
    sdim_bundle: Path, dataset: Dataset, tmp_path: Path
) -> None:
    model = load_model(sdim_bundle.parent / "model")
    longer = ClickModel(model.features, replace(model.settings, history_limit=99))
    longer.load_state_dict(model.state_dict())
    save_model(tmp_path / "model", longer, dataset.manifest)
    with pytest.raises(SettingsError, match="holds another model"):
        export_model(tmp_path / "model", dataset, sdim_bundle, METRICS)


def is_a_file(target: Path) -> None:
    shutil.rmtree(target)
    target.write_text("mine")


def holds_something_else(target: Path) -> None:
    shutil.rmtree(target)
    target.mkdir()
    (target / "notes.txt").write_text("mine")


def is_damaged(target: Path) -> None:
    (target / "weights.bin").write_bytes(b"")


@pytest.mark.parametrize("occupied", [is_a_file, holds_something_else, is_damaged])
def test_what_is_no_whole_bundle_is_left_alone_and_said_to_be_in_the_way(
    occupied: Callable[[Path], None],
    sdim_bundle: Path,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    target = shutil.copytree(sdim_bundle, tmp_path / "bundle")
    occupied(target)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(SettingsError, match=f"first remove {target}, or choose another --output"):
        export_model(sdim_bundle.parent / "model", dataset, target, METRICS)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "setting",
    [
        {"encoder": "full_target_attention", "history_limit": None},
        {"encoder": "full_target_attention", "history_limit": 65_536},
        {"encoder": "din", "history_limit": None, "window": 65_536},
        {"encoder": "sdim_long_short", "history_limit": 70_000, "window": 66_000},
    ],
)
def test_a_model_that_no_record_can_feed_is_told_how_to_be_servable(
    setting: dict[str, str | int | None], dataset: Dataset
) -> None:
    features = FeatureSpec.from_dict(asdict(dataset.manifest.features))
    unservable = ClickModelSettings(**setting)  # type: ignore[arg-type]  # of several types
    message = r"train it with --model\.history_limit of at most 65535"
    with pytest.raises(SettingsError, match=message):
        check_servable(ClickModel(features, unservable))
    check_servable(ClickModel(features, replace(unservable, history_limit=65_535)))


def test_data_of_another_training_is_refused_by_its_digest(
    sdim_bundle: Path, other_likes: Path, tmp_path: Path
) -> None:
    other = Dataset.open(other_likes)
    digests = BundleManifest.read(sdim_bundle).data_digest[:12], other.manifest.digest[:12]
    with pytest.raises(
        SettingsError, match=r"was trained on data of digest {}.*has {}".format(*digests)
    ):
        export_model(sdim_bundle.parent / "model", other, tmp_path / "bundle", METRICS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.pt", "model.json"])
def test_a_model_that_is_not_whole_is_named(
    name: str, sdim_bundle: Path, dataset: Dataset, tmp_path: Path
) -> None:
    folder = shutil.copytree(sdim_bundle.parent / "model", tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(SettingsError, match=rf"holds no trained model \({name} is missing\)"):
        export_model(folder, dataset, tmp_path / "bundle", METRICS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--run must name the folder of a finished training run"),
        (["--run", "{empty}"], "holds no finished training run"),
        (["--run", "{empty}/missing"], "holds no finished training run"),
        (["--run", "{run}", "--data", "{empty}"], "holds no finished data set"),
        (["--run", "{run}", "--data", "{other}"], "give --data of that training"),
        (["--run", "{run}", "--data", "{data}"], "holds no trained model (model.json is missing)"),
    ],
)
def test_what_cannot_be_exported_ends_with_one_line(
    options: list[str],
    message: str,
    sdim_bundle: Path,
    likes: Path,
    other_likes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = finished_run(tmp_path / "run", sdim_bundle.parent / "model")
    if "{data}" in options:
        (run / "model" / "model.json").unlink()
    (tmp_path / "empty").mkdir()
    places = {"run": run, "empty": tmp_path / "empty", "data": likes, "other": other_likes}
    assert export.main([option.format(**places) for option in options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert not (run / "bundle").exists()


def test_a_finished_run_is_exported_beside_its_model(
    graphs: Graphs,
    model_folder: Path,
    likes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = finished_run(tmp_path / "run", model_folder)
    assert export.main(["--run", str(run), "--data", str(likes)]) == 0
    manifest = Bundle.open(run / "bundle").manifest
    assert manifest.run == "run"
    assert manifest.metrics == {"test": {"gauc": 0.75}}
    assert manifest.fingerprint in capsys.readouterr().out


def finished_run(run: Path, model_folder: Path) -> Path:
    """A run's folder as a training leaves it."""
    shutil.copytree(model_folder, run / "model")
    metrics = {"test": {"gauc": 0.75}}
    result = {"name": "run", "best_epoch": 1, "epochs": [], "metrics": metrics}
    (run / "result.json").write_text(json.dumps(result))
    (run / "run.json").write_text(json.dumps({"mlflow_run_id": None}))
    return run


def changed(model: ClickModel, name: str) -> ClickModel:
    """The same model but for the first number of one weight."""
    other = ClickModel(model.features, model.settings)
    other.load_state_dict(model.state_dict())
    weight = other.state_dict()[name]
    weight.view(-1)[-1] += 1  # a view of the model's own
    return other


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("head.0.weight", True),
        ("output.bias", True),
        ("context.tables.0.weight", True),
        ("objects.tables.0.weight", False),
        ("objects.tables.1.weight", False),
        ("encoder.planes", False),
    ],
)
def test_models_share_tables_unless_what_makes_them_differs(
    name: str, shared: bool, sdim_bundle: Path
) -> None:
    manifest = BundleManifest.read(sdim_bundle)
    model = load_model(sdim_bundle.parent / "model")
    assert fingerprint(sdim_bundle, model, manifest) == manifest.fingerprint
    other = fingerprint(sdim_bundle, changed(model, name), manifest)
    assert (other == manifest.fingerprint) is shared


def test_records_without_a_table_are_shared_by_models_of_one_data_set(din_bundle: Path) -> None:
    manifest = BundleManifest.read(din_bundle)
    model = load_model(din_bundle.parent / "model")
    for name in ("objects.tables.0.weight", "encoder.product.weight", "output.bias"):
        assert fingerprint(din_bundle, changed(model, name), manifest) == manifest.fingerprint
    window = replace(manifest, recent=manifest.recent + 1)
    assert fingerprint(din_bundle, model, window) != manifest.fingerprint


def test_another_record_has_another_fingerprint(long_short_bundle: Path) -> None:
    manifest = BundleManifest.read(long_short_bundle)
    model = load_model(long_short_bundle.parent / "model")
    features = manifest.features
    others = [
        replace(manifest, history_limit=HISTORY_LIMIT + 1),
        replace(manifest, history_limit=None),
        replace(manifest, recent=WINDOW + 1),
        replace(manifest, features=replace(features, counters=(*features.counters, "kind"))),
        replace(manifest, features=replace(features, behaviour=features.behaviour[::-1])),
        replace(manifest, table=replace(manifest.table, groups=2, buckets=16)),
    ]
    found = {fingerprint(long_short_bundle, model, other) for other in (manifest, *others)}
    assert len(found) == 1 + len(others)
    elsewhere = replace(manifest, run="other", metrics={}, parity=replace(manifest.parity, codes=0))
    assert fingerprint(long_short_bundle, model, elsewhere) == manifest.fingerprint


@pytest.mark.parametrize("name", ["catalogue.arrow", "encoders.json"])
def test_other_ids_have_another_fingerprint(name: str, sdim_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sdim_bundle, tmp_path / "bundle")
    with (folder / name).open("ab") as file:
        file.write(b" ")
    manifest = BundleManifest.read(folder)
    model = load_model(sdim_bundle.parent / "model")
    assert fingerprint(folder, model, manifest) != manifest.fingerprint
