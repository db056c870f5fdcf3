"""The loader against a brute-force reading of the stored tables."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hashtab.features.dataset import Batch, Dataset
from hashtab.features.errors import DataError
from hashtab.features.storage import map_arrow
from tests.features import prepared

PLACES = ["shop", "feed"]


@pytest.fixture(params=PLACES)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def per_sample_users(batch: Batch) -> np.ndarray:
    return np.repeat(batch.users, np.diff(batch.sample_offsets))


def rows_of(batch: Batch, item: str) -> list[tuple[float, ...]]:
    """Every sample with what it sees, independent of its place in the batch."""
    rows = []
    for b in range(len(batch.users)):
        begin = batch.history_offsets[b]
        for i in range(batch.sample_offsets[b], batch.sample_offsets[b + 1]):
            seen = batch.behaviours[item][begin : begin + batch.cuts[i]]
            context = tuple(float(column[i]) for column in batch.context.values())
            rows.append(
                (
                    float(batch.users[b]),
                    float(batch.candidates[item][i]),
                    float(batch.labels[i]),
                    float(batch.history_lengths[i]),
                    float(batch.item_counts[i]),
                    *batch.counters[i].tolist(),
                    *context,
                    float(np.dot(seen, np.arange(1, len(seen) + 1))),
                )
            )
    return rows


def test_batches_hold_exactly_what_is_stored(folder: Path) -> None:
    dataset = Dataset.open(folder)
    item = dataset.manifest.schema.item_name
    histories = prepared.histories(folder)
    ids = dict(prepared.catalogue(folder).select("_item", item).iter_rows())
    raw = pl.read_ipc(folder / "tables" / "users.arrow")["_user"].to_list()
    mine = {user: part for (user,), part in histories.group_by("user", maintain_order=True)}
    found, wanted = [], []
    for batch in dataset.batches("validation", samples_per_batch=100):
        for b, user in enumerate(batch.users):
            begin = batch.history_offsets[b]
            for i in range(batch.sample_offsets[b], batch.sample_offsets[b + 1]):
                seen = batch.behaviours[item][begin : begin + batch.cuts[i]]
                found.append((raw[user], batch.labels[i], batch.candidates[item][i], seen.tolist()))
    for row in prepared.samples(folder, "validation").iter_rows(named=True):
        past = mine[row["user"]]["item"].to_list() if row["user"] in mine else []
        past = [ids[value] for value in past[: row["history_end"]]]
        wanted.append((row["user"], row["label"], ids[row["item"]], past))
    assert sorted(found) == sorted(wanted)


def test_shapes_and_dtypes_are_those_of_the_contract(folder: Path) -> None:
    dataset = Dataset.open(folder)
    features = dataset.manifest.features
    for batch in dataset.batches("train", samples_per_batch=200, shuffle_seed=3):
        samples, behaviours = batch.sample_offsets[-1], batch.history_offsets[-1]
        assert batch.history_offsets[0] == batch.sample_offsets[0] == 0
        for name in ("users", "history_offsets", "sample_offsets", "cuts", "history_lengths"):
            assert getattr(batch, name).dtype == np.int64
        assert batch.item_counts.dtype == np.int32
        assert batch.labels.dtype == batch.counters.dtype == np.float32
        assert batch.counters.shape == (samples, len(features.counters))
        places = (
            (features.behaviour, batch.behaviours, behaviours),
            (features.candidate, batch.candidates, samples),
            (features.context, batch.context, samples),
        )
        for declared, columns, length in places:
            assert [f.name for f in declared] == list(columns)
            for feature in declared:
                column = columns[feature.name]
                assert column.shape == (length,)
                categorical = feature.kind == "categorical"
                assert column.dtype == (np.int32 if categorical else np.float32)
                assert np.isfinite(column).all()
                if categorical and length:
                    assert 1 <= column.min() <= column.max() < feature.size
        for b in range(len(batch.users)):
            cuts = batch.cuts[batch.sample_offsets[b] : batch.sample_offsets[b + 1]]
            assert len(cuts) > 0
            assert (np.diff(cuts) >= 0).all()
            assert cuts[-1] == np.diff(batch.history_offsets)[b]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_all_ranks_together_see_everything_once(
    folder: Path, world_size: int, seed: int | None
) -> None:
    dataset = Dataset.open(folder)
    item = dataset.manifest.schema.item_name
    whole = [r for b in dataset.batches("train", 150) for r in rows_of(b, item)]
    parts = []
    for rank in range(world_size):
        batches = list(
            dataset.batches("train", 150, shuffle_seed=seed, rank=rank, world_size=world_size)
        )
        assert len(batches) == dataset.n_batches("train", 150, world_size)
        parts += [row for batch in batches for row in rows_of(batch, item)]
        sizes = [len(batch.labels) for batch in batches]
        assert np.mean(sizes) < 300
    assert sorted(parts) == sorted(whole)
    assert len(whole) == dataset.manifest.splits["train"].samples


def test_order_follows_from_the_seed_and_start_resumes(folder: Path) -> None:
    dataset = Dataset.open(folder)
    item = dataset.manifest.schema.item_name

    def epoch(seed: int, start: int = 0) -> list[list[tuple[float, ...]]]:
        batches = dataset.batches("train", 100, shuffle_seed=seed, start=start)
        return [rows_of(batch, item) for batch in batches]

    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2)
    assert epoch(1, start=3) == epoch(1)[3:]
    assert len(epoch(1)) > 5


@pytest.mark.parametrize("limit", [1, 7, 10_000])
def test_a_history_limit_drops_only_what_no_sample_may_see(folder: Path, limit: int) -> None:
    dataset = Dataset.open(folder)
    item = dataset.manifest.schema.item_name
    pairs = zip(
        dataset.batches("test", 200), dataset.batches("test", 200, history_limit=limit), strict=True
    )
    for full, trimmed in pairs:
        assert (full.history_lengths == trimmed.history_lengths).all()
        for b in range(len(full.users)):
            samples = range(full.sample_offsets[b], full.sample_offsets[b + 1])
            first = int(full.cuts[samples[0]])
            kept = np.diff(trimmed.history_offsets)[b]
            assert kept == full.cuts[samples[-1]] - max(0, first - limit)
            for i in samples:
                a, z = full.history_offsets[b], trimmed.history_offsets[b]
                whole = full.behaviours[item][a : a + full.cuts[i]]
                tail = trimmed.behaviours[item][z : z + trimmed.cuts[i]]
                assert (whole[-limit:] == tail[-limit:]).all()


def test_histories_are_views_of_the_mapped_files(folder: Path) -> None:
    for path in (folder / "histories").glob("*"):
        for column in map_arrow(path).values():
            assert not column.flags.owndata
            assert not column.flags.writeable


def test_a_user_larger_than_a_batch_fills_one(folder: Path) -> None:
    dataset = Dataset.open(folder)
    batches = list(dataset.batches("train", samples_per_batch=1))
    assert len(batches) == dataset.manifest.splits["train"].users
    assert all(len(batch.users) == 1 for batch in batches)


def test_arguments_out_of_range_are_refused(shop: Path) -> None:
    dataset = Dataset.open(shop)
    with pytest.raises(DataError, match="no split 'tset'; known: train"):
        dataset.batches("tset")
    with pytest.raises(DataError, match="rank must be"):
        dataset.batches("train", rank=2, world_size=2)
    with pytest.raises(DataError, match="history_limit must be positive"):
        dataset.batches("train", history_limit=0)
    with pytest.raises(DataError, match="users for world_size=1000"):
        dataset.n_batches("train", world_size=1000)


@pytest.fixture
def copy(shop: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shop, tmp_path / "copy"))


def test_a_truncated_or_missing_file_is_refused(copy: Path) -> None:
    path = next((copy / "histories").glob("*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{path.name} should hold"):
        Dataset.open(copy)
    path.unlink()
    with pytest.raises(DataError, match="found None"):
        Dataset.open(copy)


def test_an_altered_file_is_refused_when_asked_for(copy: Path) -> None:
    path = next((copy / "samples" / "test").glob("*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="was altered"):
        Dataset.open(copy, verify=True)


def test_an_altered_manifest_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | {"users": plain["users"] + 1}))
    with pytest.raises(DataError, match="was altered"):
        Dataset.open(copy)
    path.write_text(json.dumps(plain | {"format": 99}))
    with pytest.raises(DataError, match="has format 99"):
        Dataset.open(copy)


def test_the_digest_does_not_depend_on_where_the_files_lie(shop: Path, tmp_path: Path) -> None:
    from tests.features import logs

    elsewhere = prepared.build(logs.shop(tmp_path / "raw"), tmp_path / "out")
    assert Dataset.open(elsewhere).manifest.digest == Dataset.open(shop).manifest.digest
