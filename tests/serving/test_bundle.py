"""A bundle is opened whole or not at all, and its tables and scores are the same bits always."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings

from hashtab.features.manifest import Feature
from hashtab.features.storage import Array
from hashtab.pipelines.parity import Case, torch_scores
from hashtab.pipelines.saved_model import load_model
from hashtab.serving.bundle import Bundle, Candidates
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.golden import GoldenBatch
from hashtab.serving.manifest import BundleManifest
from hashtab.serving.store import (
    TableOverflowError,
    UserRecord,
    add,
    pack,
    sum_by_bucket,
    unpack,
)
from tests.pipelines.bundles import HISTORY_LIMIT, WINDOW
from tests.tolerances import TOLERANCE

ROOT = Path(__file__).resolve().parents[2]
CLOSE = TOLERANCE[torch.float32]
FILES = (
    "catalogue.arrow",
    "encoder.onnx",
    "encoders.json",
    "golden.npz",
    "items.onnx",
    "online.onnx",
    "scorer.onnx",
    "weights.bin",
)
few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def bundle(shop_bundle: Path) -> Bundle:
    return Bundle.open(shop_bundle)


@pytest.fixture
def copy(shop_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return shutil.copytree(shop_bundle, tmp_path / "bundle")


def columns(features: tuple[Feature, ...], count: int, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        f.name: rng.integers(1, f.size, count).astype(np.int32)
        if f.kind == "categorical"
        else rng.normal(size=count).astype(np.float32)
        for f in features
    }


def behaviours_of(bundle: Bundle, count: int, seed: int = 0) -> dict[str, Array]:
    return columns(bundle.manifest.features.behaviour, count, seed)


def candidates_of(bundle: Bundle, count: int, seed: int = 0) -> Candidates:
    features = bundle.manifest.features
    counters = np.random.default_rng(seed).random((count, len(features.counters)))
    return Candidates(
        features=columns(features.candidate, count, seed),
        context=columns(features.context, count, seed + 1),
        counters=counters.astype(np.float32),
    )


def taken(parts: dict[str, Array], rows: Array) -> dict[str, Array]:
    return {name: column[rows] for name, column in parts.items()}


def some(candidates: Candidates, rows: Array) -> Candidates:
    return Candidates(
        features=taken(candidates.features, rows),
        context=taken(candidates.context, rows),
        counters=candidates.counters[rows],
    )


def record_of(bundle: Bundle, behaviours: dict[str, Array]) -> UserRecord:
    count = len(next(iter(behaviours.values())))
    return bundle.record(behaviours, np.arange(count), np.full(count, -1))


def reseal(folder: Path) -> None:
    """Write the manifest anew, as someone would who wants an edited bundle to pass for whole."""
    BundleManifest.read(folder).write(folder)


def with_prices(bundle: Bundle, prices: Array) -> dict[str, Array]:
    """Behaviours that are nothing but their price."""
    return {
        f.name: np.zeros(len(prices), np.int32 if f.kind == "categorical" else np.float32)
        for f in bundle.manifest.features.behaviour
    } | {"price": prices.astype(np.float32)}


def price_of(bundle: Bundle, component: float) -> float:
    """The price of a behaviour whose largest component this is."""
    _, _, vectors = bundle.encode(with_prices(bundle, np.ones(1)))
    return component / (float(np.abs(vectors).max()) / 2**16)


def test_a_bundle_holds_these_files_and_each_is_in_its_manifest(shop_bundle: Path) -> None:
    assert {path.name for path in shop_bundle.rglob("*")} == {*FILES, "manifest.json"}
    assert set(BundleManifest.read(shop_bundle).files) == set(FILES)


def test_no_file_of_a_bundle_names_a_place_on_the_machine_that_wrote_it(shop_bundle: Path) -> None:
    places = (str(ROOT), str(shop_bundle.parent), sys.prefix, "site-packages")
    for path in shop_bundle.iterdir():
        content = path.read_bytes()
        assert [place for place in places if place.encode() in content] == [], path.name


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, edit, empty, Path.unlink, replace_by_a_folder])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name: str, damage: Callable[[Path], None], copy: Path) -> None:
    damage(copy / name)
    with pytest.raises(BundleError, match=rf"{name} (should|is)") as caught:
        Bundle.open(copy)
    assert str(copy / name) in str(caught.value)
    assert "export the model again" in str(caught.value)


def test_a_bundle_of_links_is_a_bundle(shop_bundle: Path, tmp_path: Path) -> None:
    for path in shop_bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert Bundle.open(tmp_path).manifest == BundleManifest.read(shop_bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run", "other"),
        ("fingerprint", "0123456789abcdef"),
        ("recent", 5),
        ("history_limit", None),
        ("counts_behaviours", True),
        ("files", {}),
    ],
)
def test_an_edited_manifest_is_refused(key: str, value: object, copy: Path) -> None:
    path = copy / "manifest.json"
    plain = json.loads(path.read_text())
    assert plain[key] != value
    path.write_text(json.dumps(plain | {key: value}))
    with pytest.raises(BundleError, match=r"manifest\.json was altered"):
        Bundle.open(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"format": 3}', "\0", "{}"])
def test_a_manifest_that_is_none_is_refused(text: str, copy: Path) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json (is no manifest|has format None)"):
        Bundle.open(copy)


def test_a_manifest_of_a_future_format_is_refused_by_its_format(copy: Path) -> None:
    path = copy / "manifest.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({"format": plain["format"] + 1, "graphs": ["new"]}))
    with pytest.raises(BundleError, match=r"has format 4, this version reads 3; export"):
        Bundle.open(copy)


def test_a_folder_without_a_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BundleError, match=r"holds no bundle.*pipelines/export\.py"):
            Bundle.open(folder)


def _edit_golden(folder: Path, **changes: Callable[[Array], Array]) -> None:
    golden = GoldenBatch.read(folder / "golden.npz")
    edited: dict[str, Any] = {n: change(getattr(golden, n)) for n, change in changes.items()}
    dataclasses.replace(golden, **edited).write(folder / "golden.npz")
    reseal(folder)


def test_scores_that_this_machine_computes_otherwise_are_refused(copy: Path) -> None:
    _edit_golden(copy, scores=lambda scores: scores + np.float32(5e-5))
    Bundle.open(copy)
    _edit_golden(copy, scores=lambda scores: scores + np.float32(1e-4))
    with pytest.raises(BundleError, match=r"scorer\.onnx scores its golden batch 0\.00015 apart"):
        Bundle.open(copy)
    _edit_golden(copy, scores=lambda scores: scores * np.nan)
    with pytest.raises(BundleError, match=r"scorer\.onnx scores its golden batch nan apart"):
        Bundle.open(copy)


def test_halves_of_the_scorer_that_this_machine_computes_otherwise_are_refused(
    copy: Path,
) -> None:
    online = onnx.load(copy / "online.onnx", load_external_data=False)
    (bias,) = (t for t in online.graph.initializer if t.name == "model.output.bias")
    bias.raw_data = (onnx.numpy_helper.to_array(bias) + np.float32(1e-5)).tobytes()
    (copy / "online.onnx").write_bytes(online.SerializeToString())
    reseal(copy)
    message = r"items\.onnx and online\.onnx differ from scorer\.onnx in \d+ of \d+ scores"
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


@pytest.mark.parametrize("part", ["codes", "increments"])
def test_hashes_that_this_machine_computes_otherwise_are_refused(part: str, copy: Path) -> None:
    def one_more(array: Array) -> Array:
        changed = array.copy()
        changed.flat[0] += 1
        return changed

    _edit_golden(copy, **{part: one_more})
    with pytest.raises(
        BundleError, match=r"encoder\.onnx hashes its golden batch to other buckets"
    ):
        Bundle.open(copy)


def test_the_golden_batch_has_behaviours_and_candidates_of_several_users(
    shop_bundle: Path,
) -> None:
    golden = GoldenBatch.read(shop_bundle / "golden.npz")
    assert len(golden.scores) > 1
    assert golden.scores.shape[1] > 1
    assert golden.codes.shape[1] > HISTORY_LIMIT
    assert golden.increments.any()


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip"])
def test_a_golden_batch_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"golden\.npz cannot be read"):
        GoldenBatch.read(path)


def test_a_golden_batch_that_lacks_a_part_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", scores=np.zeros(1))
    with pytest.raises(BundleError, match=r"golden\.npz cannot be read: 'increments'"):
        GoldenBatch.read(tmp_path / "golden.npz")


def test_a_golden_batch_never_unpickles(tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", scores=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BundleError, match=r"golden\.npz cannot be read.*allow_pickle"):
        GoldenBatch.read(tmp_path / "golden.npz")


@pytest.mark.parametrize("name", ["scorer.onnx", "items.onnx", "online.onnx", "encoder.onnx"])
def test_a_graph_that_onnxruntime_cannot_load_is_named(name: str, copy: Path) -> None:
    (copy / name).write_bytes(b"no graph")
    reseal(copy)
    with pytest.raises(BundleError, match=rf"{name} cannot be loaded by onnxruntime"):
        Bundle.open(copy)


@few
@given(seeds, st.integers(1, 60), st.lists(st.integers(0, 60), max_size=4))
def test_order_pieces_and_restarts_do_not_change_a_bit_of_a_table(
    bundle: Bundle, seed: int, count: int, cuts: list[int]
) -> None:
    behaviours = behaviours_of(bundle, count, seed)
    empty = UserRecord.empty(bundle.layout)
    at_once = add(empty.table, bundle.increments(behaviours))
    assert np.array_equal(bundle.increments(behaviours), bundle.encode(behaviours)[0])
    order = np.random.default_rng(seed).permutation(count)
    record = empty
    for piece in np.split(order, sorted(min(cut, count) for cut in cuts)):
        table = add(record.table, bundle.increments(taken(behaviours, piece)))
        stored = pack(dataclasses.replace(record, table=table), bundle.layout)
        record = unpack(stored, bundle.layout)
    assert record.table.tobytes() == at_once.tobytes()


@few
@given(seeds, st.integers(1, 30), st.integers(0, 30))
def test_behaviours_that_expire_one_by_one_leave_the_table_of_the_rest(
    bundle: Bundle, seed: int, count: int, expired: int
) -> None:
    behaviours = behaviours_of(bundle, count, seed)
    table = add(np.zeros(bundle.layout.shape, np.int32), bundle.increments(behaviours))
    for i in range(min(expired, count)):
        table = add(table, -bundle.increments(taken(behaviours, np.array([i]))))
    rest = bundle.increments(taken(behaviours, np.arange(min(expired, count), count)))
    assert table.tobytes() == rest.astype(np.int32).tobytes()


def test_sums_that_int32_cannot_hold_in_one_call_are_exact(bundle: Bundle) -> None:
    behaviours = with_prices(bundle, np.full(5000, price_of(bundle, 250.0)))
    wrapped, codes, vectors = bundle.encode(behaviours)
    increments = bundle.increments(behaviours)
    assert np.array_equal(increments, sum_by_bucket(codes, vectors, bundle.layout.buckets))
    assert not np.array_equal(increments, wrapped)
    with pytest.raises(TableOverflowError, match="limit the behaviours of a history"):
        add(np.zeros(bundle.layout.shape, np.int32), increments)


@pytest.mark.parametrize("component", [256.1, -256.1, 1e9, np.inf, -np.inf, np.nan])
def test_a_behaviour_that_no_table_holds_is_refused_with_its_likely_cause(
    bundle: Bundle, component: float
) -> None:
    price = price_of(bundle, component)
    with pytest.raises(TableOverflowError, match="an outlier in the numeric features"):
        bundle.increments(with_prices(bundle, np.array([1.0, price])))


def test_a_behaviour_just_below_the_bound_is_kept(bundle: Bundle) -> None:
    increments = bundle.increments(with_prices(bundle, np.array([price_of(bundle, 255.9)])))
    assert np.abs(increments).max() == pytest.approx(255.9 * 2**16, rel=1e-4)


def test_threads_lose_no_behaviour_of_a_table(shop_bundle: Path) -> None:
    # onnxruntime's ScatterND adds to a row from several threads without a lock.
    bundle = Bundle.open(shop_bundle, threads=4)
    for seed in range(5):
        increments, codes, vectors = bundle.encode(behaviours_of(bundle, 60_000, seed))
        expected = np.stack(
            [[np.bincount(c, v, bundle.layout.buckets) for v in vectors.T] for c in codes.T]
        )
        assert np.array_equal(increments, expected.transpose(0, 2, 1))


def test_a_record_holds_the_latest_behaviours_and_no_others(bundle: Bundle) -> None:
    behaviours = behaviours_of(bundle, 40)
    record = record_of(bundle, behaviours)
    latest = taken(behaviours, np.arange(40 - HISTORY_LIMIT, 40))
    assert np.array_equal(record.table, bundle.increments(latest))
    assert record.behaviours == HISTORY_LIMIT
    assert record.recent_times.tolist() == list(range(40 - WINDOW, 40))
    for name, column in record.recent.items():
        assert np.array_equal(column, behaviours[name][-WINDOW:])


def test_the_record_of_an_empty_history_is_the_empty_record(bundle: Bundle) -> None:
    record = dataclasses.replace(record_of(bundle, behaviours_of(bundle, 0)), revision=0)
    assert pack(record, bundle.layout) == pack(UserRecord.empty(bundle.layout), bundle.layout)


@few
@given(seeds, st.integers(0, 40), st.sets(st.integers(0, 49), min_size=1))
@example(0, 40, {7})
def test_a_score_has_the_same_bits_whatever_the_other_candidates(
    bundle: Bundle, seed: int, length: int, chosen: set[int]
) -> None:
    record = record_of(bundle, behaviours_of(bundle, length, seed))
    candidates = candidates_of(bundle, 50, seed)
    rows = np.array(sorted(chosen))
    alone = bundle.score(record, some(candidates, rows))
    assert alone.tobytes() == bundle.score(record, candidates)[rows].tobytes()


@pytest.mark.parametrize("count", [1, 2, 4096, 4097, 9000])
def test_an_items_parts_have_the_same_bits_whatever_the_other_items(
    bundle: Bundle, count: int
) -> None:
    features = columns(bundle.manifest.features.candidate, count, seed=count)
    parts = bundle.item_parts(features)
    for row in {0, count // 2, count - 1}:
        alone = bundle.item_parts(taken(features, np.array([row])))
        assert {name: part.tobytes() for name, part in alone.items()} == {
            name: part[row].tobytes() for name, part in parts.items()
        }
    assert {len(part) for part in parts.values()} == {count}


@few
@given(seeds, st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=5))
def test_a_score_has_the_same_bits_whatever_the_other_users(
    bundle: Bundle, seed: int, users: list[tuple[int, int]]
) -> None:
    records = [record_of(bundle, behaviours_of(bundle, n, seed + n)) for n, _ in users]
    candidates = [candidates_of(bundle, count, seed + count) for _, count in users]
    together = bundle.score_users(records, candidates)
    for scores, record, part in zip(together, records, candidates, strict=True):
        assert scores.tobytes() == bundle.score(record, part).tobytes()


def test_threads_of_a_process_share_one_bundle(shop_bundle: Path) -> None:
    bundle = Bundle.open(shop_bundle)
    histories = [behaviours_of(bundle, 5 * seed, seed) for seed in range(16)]
    candidates = [candidates_of(bundle, 1 + 20 * seed, seed) for seed in range(16)]

    def answer(user: int) -> tuple[bytes, bytes]:
        record = record_of(bundle, histories[user])
        return record.table.tobytes(), bundle.score(record, candidates[user]).tobytes()

    order = [user for _ in range(10) for user in range(16)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, order))  # first, so that they share the first use too
    assert together == [answer(user) for user in range(16)] * 10


def test_more_threads_give_nearly_the_same_scores(shop_bundle: Path, bundle: Bundle) -> None:
    record, candidates = record_of(bundle, behaviours_of(bundle, 30)), candidates_of(bundle, 2000)
    found = Bundle.open(shop_bundle, threads=4).score(record, candidates)
    np.testing.assert_allclose(found, bundle.score(record, candidates), **CLOSE)


SCORE = """
import sys
for name in {blocked}:
    sys.modules[name] = None
import numpy as np
from hashtab.serving.bundle import Bundle, Candidates

bundle = Bundle.open(sys.argv[1])
asked = np.load(sys.argv[2])
part = lambda role: {{n.partition("/")[2]: asked[n] for n in asked if n.startswith(role + "/")}}
behaviours = part("behaviour")
length = len(next(iter(behaviours.values())))
record = bundle.record(behaviours, np.arange(length), np.full(length, -1))
candidates = Candidates(
    features=part("candidate"), context=part("context"), counters=asked["counters"]
)
np.save(sys.argv[3], bundle.score(record, candidates))
"""


def test_a_process_that_has_no_torch_scores_as_torch_does(
    shop_bundle: Path, bundle: Bundle, tmp_path: Path
) -> None:
    behaviours, candidates = behaviours_of(bundle, 40), candidates_of(bundle, 9)
    parts: dict[str, Any] = {
        f"{role}/{name}": column
        for role, columns in (
            ("behaviour", behaviours),
            ("candidate", candidates.features),
            ("context", candidates.context),
        )
        for name, column in columns.items()
    }
    np.savez(tmp_path / "asked.npz", counters=candidates.counters, **parts)
    blocked = ["torch", "ray", "mlflow", "onnx", "onnxscript", "pandas", "sklearn"]
    files = [str(tmp_path / "asked.npz"), str(tmp_path / "scores.npy")]
    command = [sys.executable, "-c", SCORE.format(blocked=blocked), str(shop_bundle), *files]
    subprocess.run(command, cwd=ROOT, check=True)
    case = Case(name="", behaviours=behaviours, candidates=candidates)
    expected = torch_scores(load_model(shop_bundle.parent / "model"), case)
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, **CLOSE)


def test_candidates_that_lack_a_feature_are_named(bundle: Bundle) -> None:
    whole = candidates_of(bundle, 3)
    record = record_of(bundle, behaviours_of(bundle, 5))
    with pytest.raises(RequestError, match="the candidates have no 'hour', which the model reads"):
        bundle.score(record, dataclasses.replace(whole, context={}))
    with pytest.raises(RequestError, match=r"they have \[\]"):
        bundle.score(record, dataclasses.replace(whole, features={}))
    with pytest.raises(RequestError, match=r"they have \[\]"):
        bundle.item_parts({})
    with pytest.raises(RequestError, match="the candidates have no 'hour', which the model reads"):
        bundle.score_items(record, bundle.item_parts(whole.features), {}, whole.counters)
