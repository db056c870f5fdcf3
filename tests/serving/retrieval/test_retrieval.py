"""Retrieval: vectors that mean what the scorer means, few misses, filters that hold."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hashtab.features.dataset import Dataset
from hashtab.features.encoders import Encoder
from hashtab.features.histories import HistoryReader
from hashtab.pipelines.encoding import record_of_user
from hashtab.serving.bundle import Bundle
from hashtab.serving.manifest import BundleManifest
from hashtab.serving.retrieval import (
    IndexManifest,
    RetrievalError,
    RetrievalIndex,
    item_vectors,
    mean_behaviour,
    seen_rows,
)
from hashtab.serving.retrieval.space import RIDGE, SHRINKAGE
from hashtab.serving.store import SCALE, UserRecord
from tests.pipelines.bundles import export_bundle, small_model
from tests.pipelines.reference import shop_log
from tests.serving.retrieval.conftest import ITEMS, Many, build_many

Rows = np.ndarray


def records(bundle: Bundle, data: Path) -> dict[int, UserRecord]:
    reader, found = HistoryReader(data, bundle.catalogue, bundle_side(bundle)), {}
    for shard in range(reader.manifest.shards):
        histories = reader.shard(shard)
        for i, user in enumerate(histories.users.to_list()):
            found[user] = record_of_user(bundle, histories, i, 2**62)
    return found


def bundle_side(bundle: Bundle) -> dict[str, Encoder]:
    return {name: bundle.encoders[name] for name in bundle.manifest.side}


def similarities(many: Many, query_mean: np.ndarray, behaviours: float) -> np.ndarray:
    """The formula of the module, word for word."""
    weight = many.counts / many.counts.sum()
    centred = many.vectors - weight @ many.vectors
    covariance = np.einsum("n,ni,nj->ij", weight, centred, centred)
    ridge = RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    everyone = np.average(many.sample.means, axis=0, weights=many.sample.behaviours)
    apart = (query_mean - everyone) * behaviours / (behaviours + SHRINKAGE)
    inner: np.ndarray = many.vectors @ np.linalg.solve(covariance + ridge, apart)
    similarity: np.ndarray = inner + np.log1p(many.counts)
    return similarity


def of_user(many: Many, index: RetrievalIndex, user: int) -> np.ndarray:
    means, behaviours = many.sample.means[user][None], many.sample.behaviours[[user]]
    query: np.ndarray = index.space.queries(means, behaviours)[0]
    return query


def test_an_items_vector_is_the_candidates_whatever_the_unknown_side_feature_has_learned(
    shop_data: Path, tmp_path: Path
) -> None:
    dataset = Dataset.open(shop_data)
    model = small_model(dataset, "sdim")
    with torch.no_grad():
        for table in model.objects.tables:
            table.weight[1] = 3.0  # type: ignore[operator]
    bundle = Bundle.open(export_bundle(tmp_path / "run", model, dataset))
    names = [f.name for f in bundle.manifest.features.candidate]
    columns = bundle.catalogue.columns(np.arange(len(bundle.catalogue)), names)
    tensors = {name: torch.from_numpy(column.copy()) for name, column in columns.items()}
    with torch.no_grad():
        wanted = model.objects(tensors, model.features.candidate).numpy()
    found = item_vectors(bundle)
    assert "store" in bundle.manifest.side
    assert np.abs(found - wanted).max() <= 0.5 / SCALE + 1e-6
    assert np.abs(wanted).max() > 1


def test_the_mean_behaviour_is_that_of_the_latest_in_the_table(
    shop_bundle: Path, shop_data: Path
) -> None:
    bundle = Bundle.open(shop_bundle)
    reader = HistoryReader(shop_data, bundle.catalogue, bundle_side(bundle))
    histories = reader.shard(0)
    names = [f.name for f in bundle.manifest.features.behaviour if f.name in bundle.manifest.items]
    kept = histories.of(0)
    last = slice(kept.stop - 12, kept.stop)
    columns = bundle.catalogue.columns(histories.rows[last], names)
    columns |= {name: column[last] for name, column in histories.side.items()}
    _, _, vectors = bundle.encode(columns)
    record = record_of_user(bundle, histories, 0, 2**62)
    assert np.allclose(mean_behaviour(record), vectors.mean(axis=0) / SCALE, rtol=0, atol=1e-9)
    assert not mean_behaviour(UserRecord.empty(bundle.layout)).any()


def test_what_a_user_has_seen_is_what_their_log_says(shop_bundle: Path, shop_data: Path) -> None:
    bundle = Bundle.open(shop_bundle)
    log = shop_log(shop_data)
    for user, record in records(bundle, shop_data).items():
        rows = seen_rows(bundle, record)
        assert rows is not None
        found = set(bundle.catalogue.items.gather(rows).to_list())
        assert found == set(log.filter(log["user"] == user)["item"])


def test_a_model_that_counts_no_items_does_not_know_what_was_seen(shop_bundle: Path) -> None:
    bundle = Bundle.open(shop_bundle)
    features = replace(bundle.manifest.features, counters=("kind",))
    bundle.layout = replace(bundle.manifest, features=features).layout
    assert seen_rows(bundle, UserRecord.empty(bundle.layout)) is None


def test_similarity_is_what_the_formula_says(many: Many, many_index: RetrievalIndex) -> None:
    for user in range(3):
        found = many_index.find(of_user(many, many_index, user), ITEMS)
        wanted = similarities(many, many.sample.means[user], many.sample.behaviours[user])
        assert len(found.rows) == ITEMS
        assert np.allclose(found.similarity, wanted[found.rows], atol=1e-3)


def test_a_user_without_history_gets_what_is_met_most(
    shop_bundle: Path, shop_index: Path, shop_data: Path
) -> None:
    bundle = Bundle.open(shop_bundle)
    index = RetrievalIndex.open(shop_index, bundle)
    found = index.search(UserRecord.empty(bundle.layout), 10)
    log = shop_log(shop_data)
    before = log.filter(log["time"] < index.manifest.as_of)
    counts = dict(before["item"].value_counts().iter_rows())
    most = sorted(counts.values(), reverse=True)[:10]
    assert [counts[item] for item in bundle.catalogue.items.gather(found.rows)] == most
    assert np.allclose(np.expm1(found.similarity), most, rtol=1e-3)


def test_a_search_finds_nearly_all_that_comparing_every_item_finds(
    many: Many, many_index: RetrievalIndex
) -> None:
    manifest = many_index.manifest
    assert manifest.kind == "ivf"
    assert manifest.nprobe < manifest.nlist / 2
    shares = []
    for user in range(60):
        wanted = similarities(many, many.sample.means[user], many.sample.behaviours[user])
        best = np.argsort(-wanted)[:500]
        found = many_index.find(of_user(many, many_index, user), 500)
        assert (np.diff(found.similarity) <= 0).all()
        shares.append(np.isin(best, found.rows).mean())
    assert np.mean(shares) >= 0.98
    assert manifest.recall.value >= 0.985
    assert manifest.recall.users == 100
    assert manifest.recall.seen_excluded


def test_the_recall_in_the_manifest_is_of_users_who_did_not_choose(
    many: Many, many_index: RetrievalIndex
) -> None:
    shares = []
    for user in range(1, 200, 2):
        seen, query = many.sample.seen[user], of_user(many, many_index, user)  # type: ignore[index]
        wanted = similarities(many, many.sample.means[user], many.sample.behaviours[user])
        wanted[seen] = -np.inf
        best = np.argsort(-wanted)[:500]
        shares.append(np.isin(best, many_index.find(query, 500, excluded=seen).rows).mean())
    assert np.mean(shares) == pytest.approx(many_index.manifest.recall.value, abs=1e-4)


def test_what_is_excluded_is_never_found(many: Many, many_index: RetrievalIndex) -> None:
    query = of_user(many, many_index, 0)
    first = many_index.find(query, 500).rows
    second = many_index.find(query, 500, excluded=first).rows
    assert len(second) == 500
    assert not np.isin(second, first).any()
    all_but_three = np.setdiff1d(np.arange(ITEMS), [5, 77, 19_999])
    assert set(many_index.find(query, 500, excluded=all_but_three).rows) == {5, 77, 19_999}
    assert len(many_index.find(query, 500, excluded=np.arange(ITEMS)).rows) == 0


@pytest.mark.parametrize("allowed", [30, 2_000, 2_100, 8_000])
def test_only_what_is_allowed_is_found_and_nearly_all_of_it(
    allowed: int, many: Many, many_index: RetrievalIndex
) -> None:
    rows = np.random.default_rng(allowed).choice(ITEMS, allowed, replace=False)
    excluded = rows[:10]
    for user in range(5):
        query = of_user(many, many_index, user)
        wanted = similarities(many, many.sample.means[user], many.sample.behaviours[user])
        left = np.setdiff1d(rows, excluded)
        best = left[np.argsort(-wanted[left])][:200]
        found = many_index.find(query, 200, excluded=excluded, allowed=rows).rows
        assert len(found) == min(200, allowed - 10)
        assert np.isin(found, left).all()
        assert np.isin(best, found).mean() >= (1.0 if allowed <= 2_000 else 0.95)
        assert len(np.unique(found)) == len(found)


def test_as_many_are_found_as_there_are(many: Many, many_index: RetrievalIndex) -> None:
    query = of_user(many, many_index, 0)
    assert len(np.unique(many_index.find(query, 10 * ITEMS).rows)) == ITEMS
    assert len(many_index.find(query, 5, allowed=np.empty(0, np.int64)).rows) == 0


def test_the_same_items_give_the_same_index(many: Many, shop_bundle: Path, tmp_path: Path) -> None:
    build_many(Bundle.open(shop_bundle), tmp_path)
    digests = [IndexManifest.read(folder).digest for folder in (many.folder, tmp_path)]
    assert digests[0] == digests[1]


def test_the_index_of_another_fingerprint_is_refused(
    shop_index: Path, shop_bundle: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(shop_bundle, tmp_path / "bundle")
    replace(BundleManifest.read(folder), fingerprint="0123456789abcdef").write(folder)
    with pytest.raises(RetrievalError, match="its vectors mean something else") as error:
        RetrievalIndex.open(shop_index, Bundle.open(folder))
    assert "0123456789abcdef" in str(error.value)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"nprobe": 1', '"nprobe": 2'))


def _age(path: Path) -> None:
    path.write_text(path.read_text().replace('"format": 1', '"format": 0'))


@pytest.mark.parametrize(
    ("file", "harm", "said"),
    [
        ("manifest.json", Path.unlink, "holds no index of items"),
        ("manifest.json", _cut, "was altered|is no manifest"),
        ("manifest.json", _edit, "was altered after it was written"),
        ("manifest.json", _age, "has format 0, this version reads 1"),
        ("items.faiss", _cut, "items.faiss is not the file that was built"),
        ("items.faiss", Path.unlink, "items.faiss is missing from its index"),
        ("space.npz", _cut, "space.npz is not the file that was built"),
    ],
)
def test_a_damaged_index_is_refused_and_named(
    file: str,
    harm: Callable[[Path], None],
    said: str,
    shop_index: Path,
    shop_bundle: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(shop_index, tmp_path / "index")
    harm(tmp_path / "index" / file)
    if harm is _cut and file == "manifest.json":
        harm(tmp_path / "index" / file)  # its last line's end alone says nothing
    with pytest.raises(RetrievalError, match=said):
        RetrievalIndex.open(tmp_path / "index", Bundle.open(shop_bundle))
