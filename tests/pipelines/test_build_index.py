"""The index of a bundle's items as a script builds it: beside the bundle, whole, and only once."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hashtab.features.dataset import Dataset
from hashtab.pipelines import build_index
from hashtab.pipelines.build_index import IndexSettings, build, read
from hashtab.pipelines.encoding import moment
from hashtab.serving.bundle import Bundle
from hashtab.serving.retrieval import IndexManifest, RetrievalIndex, building, index_beside
from hashtab.serving.store import UserRecord
from tests.features.prepared import tree
from tests.pipelines.reference import shop_log


@pytest.fixture
def bundle(shop_bundle: Path, tmp_path: Path) -> Path:
    """A copy, since indexes lie beside their bundle."""
    shutil.copytree(shop_bundle, tmp_path / "run" / "bundle")
    return tmp_path / "run" / "bundle"


def test_the_index_lies_beside_its_bundle_and_says_how_good_it_is(
    bundle: Path, shop_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--bundle={bundle}", f"--data={shop_data}", "--as_of=test"]
    assert build_index.main(options) == 0
    folder = index_beside(bundle)
    assert folder == bundle.parent / "bundle-index"
    opened = Bundle.open(bundle)
    index = RetrievalIndex.open(folder, opened)
    manifest = index.manifest
    assert manifest.fingerprint == opened.manifest.fingerprint
    assert manifest.bundle_digest == opened.manifest.digest
    assert manifest.data_digest == Dataset.open(shop_data).manifest.digest
    assert manifest.as_of == moment(Dataset.open(shop_data), "test")
    assert (manifest.items, manifest.size) == (len(opened.catalogue), opened.layout.size + 1)
    assert (manifest.kind, manifest.recall.value) == ("flat", 1.0)
    assert manifest.recall.sample == "25 of 25 users of the data set"
    assert len(index.search(UserRecord.empty(opened.layout), 500).rows) == manifest.items
    said = capsys.readouterr().out.splitlines()
    assert f"{len(opened.catalogue)} items, " in said[0]
    assert manifest.fingerprint in said[0]
    assert "recall at 500 against exact search 1.0000" in said[1]


def test_run_again_it_leaves_the_index_as_it_is(bundle: Path, shop_data: Path) -> None:
    settings = IndexSettings(bundle=str(bundle), data=str(shop_data), as_of="test")
    folder, first = build(settings)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build(settings) == (folder, first)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_a_killed_run_left_behind_is_in_no_index(bundle: Path, shop_data: Path) -> None:
    settings = IndexSettings(bundle=str(bundle), data=str(shop_data))
    folder, _ = build(settings)
    whole = tree(folder)
    shutil.rmtree(folder)
    half = folder.with_name(f".{folder.name}.tmp")
    half.mkdir()
    (half / "items.faiss").write_text("half")
    build(settings)
    assert {k: v for k, v in tree(folder).items() if k != "manifest.json"} == {
        k: v for k, v in whole.items() if k != "manifest.json"
    }
    assert not half.exists()


def test_a_run_that_fails_leaves_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "_tuned", fail)
    with pytest.raises(KeyboardInterrupt):
        build(IndexSettings(bundle=str(bundle)))
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle"}


def test_items_are_counted_as_the_log_has_them_before_the_moment(
    bundle: Path, shop_data: Path
) -> None:
    opened, dataset = Bundle.open(bundle), Dataset.open(shop_data)
    as_of = moment(dataset, "validation")
    met = read(opened, dataset, as_of)
    log = shop_log(shop_data)
    before = log.filter(log["time"] < as_of)
    assert len(before) < len(log)
    items = opened.catalogue.items.to_list()
    wanted = Counter(before["item"].to_list())
    assert dict(zip(items, met.counts.tolist(), strict=True)) == {
        item: wanted.get(item, 0) for item in items
    }
    seen = {user: set(rows["item"]) for (user,), rows in before.group_by("user")}
    assert met.sample.seen is not None
    found = [frozenset(opened.catalogue.items.gather(rows)) for rows in met.sample.seen]
    assert Counter(found) == Counter(map(frozenset, seen.values()))


def test_without_data_users_are_made_up_and_no_item_is_popular(bundle: Path) -> None:
    folder, manifest = build(IndexSettings(bundle=str(bundle)))
    assert (manifest.data_digest, manifest.as_of) == (None, None)
    assert manifest.recall.sample == "512 made-up users of 100 random items each"
    opened = Bundle.open(bundle)
    index = RetrievalIndex.open(folder, opened)
    assert not index.knows_popularity
    nobody = index.search(UserRecord.empty(opened.layout), 5)
    assert np.allclose(nobody.similarity, 0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--bundle must name the folder of a bundle"),
        (["--bundle=nowhere"], "nowhere holds no bundle"),
        (["--bundle={bundle}", "--data=nowhere"], "nowhere holds no finished data set"),
        (["--bundle={bundle}", "--as_of=test"], "--as_of is a moment of a data set"),
        (["--bundle={bundle}", "--data={data}", "--as_of=soon"], "as_of must be a time such as"),
        (
            ["--bundle={bundle}", "--data={data}", "--as_of=2001-01-01"],
            "fewer than two users of the data have a table then",
        ),
        (["--bundle={bundle}", "--output={bundle}"], "is no manifest|has format"),
        (["--bundle={none}"], "encoder 'none' keeps no table"),
    ],
)
def test_what_cannot_be_built_ends_with_one_line(
    options: list[str],
    said: str,
    bundle: Path,
    shop_data: Path,
    none_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"bundle": bundle, "data": shop_data, "none": none_bundle}
    assert build_index.main([option.format(**places) for option in options]) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in said.split("|"))
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_an_index_of_other_data_is_not_replaced(
    bundle: Path, shop_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--bundle={bundle}", f"--data={shop_data}"]
    assert build_index.main(options) == 0
    before = IndexManifest.read(index_beside(bundle))
    assert build_index.main([*options, "--as_of=test"]) == 2
    assert "holds the index of another bundle, data set or moment" in capsys.readouterr().err
    assert IndexManifest.read(index_beside(bundle)) == before


def test_data_that_do_not_fit_the_bundle_are_refused(
    bundle: Path, likes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_index.main([f"--bundle={bundle}", f"--data={likes}"]) == 2
    assert "have no categorical side feature 'store'" in capsys.readouterr().err
    assert not index_beside(bundle).exists()
