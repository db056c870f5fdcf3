"""User tables from histories: equal to their definition, as of any time, none lost or mixed."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError
from hashtab.features.histories import HistoryReader
from hashtab.features.prepare import prepare
from hashtab.pipelines import encode_users, encoding
from hashtab.pipelines.encode_users import EncodeSettings, encode
from hashtab.pipelines.encoding import record_of_user
from hashtab.pipelines.score_batch import ScoreSettings, score
from hashtab.pipelines.shard_tasks import run_shards
from hashtab.serving.bse.building import add_model
from hashtab.serving.bse.writer import Writer
from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import BundleError
from hashtab.serving.store import (
    StoreError,
    TableStore,
    User,
    only_writer,
    open_store,
    pack,
    unpack,
)
from hashtab.serving.store.lmdb_store import LmdbStore
from tests.features import logs, prepared
from tests.pipelines import conftest
from tests.pipelines.reference import Reference, at, likes_items, likes_log, shop_items, shop_log
from tests.serving.store.servers import redis_server

DAY_US = 24 * 3600 * 1_000_000


def settings(
    bundle: Path, data: Path, store: Path | str, as_of: str | None = None
) -> EncodeSettings:
    return EncodeSettings(
        bundle=str(bundle), data=str(data), store=str(store), as_of=as_of, workers=0
    )


def records(store: Path | str, bundle: Path) -> dict[User, bytes]:
    with open_store(str(store), readonly=True) as opened:
        return dict(opened.items(Bundle.open(bundle).layout.fingerprint))


def from_log(reference: Reference, as_of: int) -> dict[User, bytes]:
    layout = reference.manifest.layout
    return {user: pack(reference.record(user, as_of), layout) for user in reference.log}


@pytest.mark.parametrize("name", ["sdim", "mean", "none", "din", "shop"])
def test_every_record_is_what_the_users_log_says_as_of_any_time(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle: Path = request.getfixturevalue(f"{name}_bundle")
    data: Path = request.getfixturevalue("shop_data" if name == "shop" else "likes")
    log, items = (shop_log, shop_items) if name == "shop" else (likes_log, likes_items)
    reference = Reference(bundle, log(data), items(data))
    times = reference.times()
    happened = times[len(times) // 2]  # in this very microsecond, which is not before it
    for as_of, text in ((times[-1] + 1, None), (happened, at(happened)), (times[0], at(times[0]))):
        encoded = encode(settings(bundle, data, tmp_path / "tables", text))
        assert encoded.encoding.as_of == as_of
        assert 0 < encoded.checked <= 32
        assert records(tmp_path / "tables", bundle) == from_log(reference, as_of)
        behaviours = sum(len(reference.past(user, as_of)) for user in reference.log)
        assert sum(report.behaviours for report in encoded.shards) == behaviours
        assert sum(report.users for report in encoded.shards) == len(reference.log)


def test_a_records_counters_are_those_of_the_prepared_samples(
    shop_bundle: Path, shop_data: Path
) -> None:
    bundle, reader = Bundle.open(shop_bundle), HistoryReader(shop_data)
    samples = prepared.samples(shop_data, "test")
    counts = []
    for (user, time), asked in samples.group_by("user", "time"):
        histories = reader.shard(reader.shard_of(user)).before(time)
        index = histories.users.to_list().index(user)
        record = record_of_user(bundle, histories, index, time)
        assert set(asked["history_end"]) == {histories.ends[index] - histories.starts[index]}
        found = bundle.counters(record, bundle.catalogue.rows(asked["item"]))
        wanted = asked.select("item_count", "count_kind").to_numpy()
        assert np.array_equal(found, np.log1p(wanted.astype(np.float32)))
        counts.append(wanted)
    assert (np.concatenate(counts) > 2).any(axis=0).all()


def test_a_splits_moment_is_that_of_its_first_request(dataset: Dataset) -> None:
    first = min(prepared.samples(dataset.folder, "test")["time"])
    assert encoding.moment(dataset, "test") == first
    assert encoding.moment(dataset, "2024-01-20") == 1_705_708_800_000_000
    assert encoding.moment(dataset, "2024-01-20T01:00+01:00") == 1_705_708_800_000_000
    # One that a float of seconds would miss.
    assert encoding.moment(dataset, "2038-01-20T13:00:00.000014") == 2_147_605_200_000_014


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis"), "--requirepass", "secret") as socket:
        yield f"unix://:secret@{socket}"


def test_redis_and_lmdb_hold_the_same_and_no_password_is_shown(
    redis_url: str,
    sdim_bundle: Path,
    likes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for store in (redis_url, str(tmp_path / "tables")):
        options = [f"--bundle={sdim_bundle}", f"--data={likes}", f"--store={store}"]
        assert encode_users.main([*options, "--workers=0", "--as_of=test"]) == 0
    shown = capsys.readouterr()
    assert "60 users, " in shown.out
    assert "secret" not in shown.out + shown.err
    assert records(redis_url, sdim_bundle) == records(tmp_path / "tables", sdim_bundle)

    pl.DataFrame({"user": [1], "candidates": [[2, 3]], "time": ["2024-02-10"]}).with_columns(
        pl.col("time").str.to_date()
    ).write_parquet(tmp_path / "requests.parquet")
    for name, store in (("redis", redis_url), ("lmdb", str(tmp_path / "tables"))):
        summary = score(
            ScoreSettings(
                bundle=str(sdim_bundle),
                requests=str(tmp_path / "requests.parquet"),
                store=store,
                output=str(tmp_path / name),
                workers=0,
            )
        )
        assert summary.stored == 1
    assert not any(b"secret" in part for part in prepared.tree(tmp_path / "redis").values())
    (one,), (other,) = ((tmp_path / name).glob("part*") for name in ("redis", "lmdb"))
    assert one.read_bytes() == other.read_bytes()


def test_run_again_it_writes_nothing(
    sdim_bundle: Path, likes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_file = tmp_path / "tables" / "data.mdb"
    first = encode(settings(sdim_bundle, likes, tmp_path / "tables"))
    before = data_file.stat().st_mtime_ns, data_file.read_bytes()
    again = encode(settings(sdim_bundle, likes, f"lmdb:{tmp_path / 'tables'}"))
    assert again.shards == first.shards
    assert (data_file.stat().st_mtime_ns, data_file.read_bytes()) == before


def test_another_moment_replaces_every_record(
    sdim_bundle: Path, likes: Path, tmp_path: Path
) -> None:
    def encoded(as_of: str | None) -> dict[User, bytes]:
        encode(settings(sdim_bundle, likes, tmp_path / "tables", as_of))
        return records(tmp_path / "tables", sdim_bundle)

    late, early, again = encoded(None), encoded("2024-01-10"), encoded(None)
    assert set(late) == set(early)
    assert all(late[user] != early[user] for user in late)
    assert again == late


def stop_after(puts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End a run as Ctrl-C would, in the midst of a shard."""
    put, left = LmdbStore.put, iter(range(puts))

    def put_some(store: TableStore, *arguments: object) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        put(store, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LmdbStore, "put", put_some)
    monkeypatch.setattr(encoding, "_USERS_AT_ONCE", 3)


def test_a_run_cut_short_goes_on_where_it_stopped(
    sdim_bundle: Path, likes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--bundle={sdim_bundle}", f"--data={likes}", "--workers=0"]
    assert encode_users.main([*options, f"--store={tmp_path / 'whole'}"]) == 0
    status = []
    for _ in range(conftest.USERS):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(12, patch)  # more than one shard's puts, fewer than two's
            status.append(encode_users.main([*options, f"--store={tmp_path / 'cut'}"]))
        if status[-1] == 0:
            break
        assert "the same command goes on" in capsys.readouterr().err
    assert status == [130, 130, 0]
    assert records(tmp_path / "cut", sdim_bundle) == records(tmp_path / "whole", sdim_bundle)


def test_a_moment_is_not_done_once_another_was_begun(
    sdim_bundle: Path, likes: Path, tmp_path: Path
) -> None:
    late = settings(sdim_bundle, likes, tmp_path / "tables")
    encode(late)
    before = records(tmp_path / "tables", sdim_bundle)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            encode(replace(late, as_of="2024-01-10"))
    assert records(tmp_path / "tables", sdim_bundle) != before
    encode(late)
    assert records(tmp_path / "tables", sdim_bundle) == before


def test_the_same_log_in_other_shards_gives_the_same_tables(
    sdim_bundle: Path, likes: Path, tmp_path: Path
) -> None:
    prepare(conftest.write_likes(tmp_path / "raw"), tmp_path / "likes", shards=70)
    sizes = [len(HistoryReader(tmp_path / "likes").shard(shard)) for shard in range(70)]
    assert 0 in sizes  # shards without users are encoded too
    encode(settings(sdim_bundle, likes, tmp_path / "tables"))
    before = records(tmp_path / "tables", sdim_bundle)
    encode(settings(sdim_bundle, tmp_path / "likes", tmp_path / "tables", "2024-01-10"))
    assert records(tmp_path / "tables", sdim_bundle) != before
    # Of three shards' notes none was written over by name, and all of their users were.
    encode(settings(sdim_bundle, likes, tmp_path / "tables"))
    assert records(tmp_path / "tables", sdim_bundle) == before


def test_later_data_of_other_ids_gives_the_same_tables_of_the_same_past(
    sdim_bundle: Path, likes: Path, tmp_path: Path
) -> None:
    schema = conftest.write_likes(tmp_path / "raw")
    log, items = likes_log(likes), likes_items(likes)
    end = log["time"].max()
    assert isinstance(end, int)
    # All of it again, as new items whose names come first.
    further = log.with_columns(item=pl.col("item") % 7 - 100, time=pl.col("time") + 60 * DAY_US)
    items = pl.concat([items, items.with_columns(item=pl.col("item") - 100)])
    longer = pl.concat([log, further])
    longer.select("user", "item", at=pl.col("time").cast(pl.Datetime("us"))).write_parquet(
        tmp_path / "raw" / "watched.parquet"
    )
    items.write_parquet(tmp_path / "raw" / "items.parquet")
    split = replace(schema.split, train_until="2024-01-30", validate_until="2024-02-02")
    prepare(replace(schema, split=split), tmp_path / "likes", shards=3)
    ids = [folder / "tables" / "catalogue.arrow" for folder in (likes, tmp_path / "likes")]
    assert ids[0].read_bytes() != ids[1].read_bytes()

    encode(settings(sdim_bundle, likes, tmp_path / "first", at(end + 1)))
    encode(settings(sdim_bundle, tmp_path / "likes", tmp_path / "later", at(end + 1)))
    first, later = (records(tmp_path / name, sdim_bundle) for name in ("first", "later"))
    assert later == first

    encode(settings(sdim_bundle, tmp_path / "likes", tmp_path / "later"))
    known = items.filter(pl.col("item") >= 0)
    reference = Reference(sdim_bundle, longer, known)
    with_unknown = records(tmp_path / "later", sdim_bundle)
    assert with_unknown == from_log(reference, end + 60 * DAY_US + 1)
    layout = reference.manifest.layout
    for user, record in with_unknown.items():
        counts = (
            unpack(data, layout).counters["item"][1].tolist() for data in (record, first[user])
        )
        assert next(counts) == next(counts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record, _: record[:-1] + bytes([record[-1] ^ 1]), "a record's checksum does not"),
        (lambda record, _: record[:40], "a record has only 40 bytes"),
        (lambda _, other: other, "the table and counters of user"),
    ],
)
def test_a_record_that_is_not_its_users_is_named(
    change: Callable[[bytes, bytes], bytes],
    said: str,
    sdim_bundle: Path,
    likes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "tables"
    options = [f"--bundle={sdim_bundle}", f"--data={likes}", f"--store={store}", "--workers=0"]
    assert encode_users.main(options) == 0
    before = records(store, sdim_bundle)
    # The sample holds the first user of a shard.
    user, other = HistoryReader(likes).shard(0).users.to_list()[:2]
    fingerprint = Bundle.open(sdim_bundle).layout.fingerprint
    with open_store(str(store)) as opened:
        opened.put(fingerprint, {user: change(before[user], before[other])})
    capsys.readouterr()
    assert encode_users.main(options) == 2
    error = capsys.readouterr().err
    assert f"user {user}" in error
    assert said in error
    assert error.count("\n") == 1
    with open_store(str(store)) as opened:
        opened.drop(fingerprint)
    assert encode_users.main(options) == 0
    assert records(store, sdim_bundle) == before


def test_a_record_that_is_missing_is_named(sdim_bundle: Path, likes: Path, tmp_path: Path) -> None:
    done = encode(settings(sdim_bundle, likes, tmp_path / "tables"))
    user = HistoryReader(likes).shard(0).users[0]
    with open_store(str(tmp_path / "tables")) as opened:
        opened.remove(Bundle.open(sdim_bundle).layout.fingerprint, [user])
    with pytest.raises(StoreError, match=f"user {user} has no record in .*, though its shard is"):
        encoding.verify_sample(done.encoding, done.shards)


def test_what_another_encoding_wrote_meanwhile_is_not_taken_for_done(
    sdim_bundle: Path, likes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = settings(sdim_bundle, likes, tmp_path / "tables")

    def with_another(task: encoding.Encoding, shards: list[int], workers: int) -> None:
        run_shards(task, shards, workers)
        run_shards(replace(task, as_of=task.as_of - DAY_US), shards[:1], workers)

    monkeypatch.setattr(encode_users, "run_shards", with_another)
    with pytest.raises(StoreError, match="another process encoded other users"):
        encode(job)
    monkeypatch.undo()
    encode(job)
    layout, end = Bundle.open(sdim_bundle).layout, encoding.moment(Dataset.open(likes), None)
    watermarks = {unpack(r, layout).watermark for r in records(job.store, sdim_bundle).values()}
    assert watermarks == {end}


def test_two_encodings_at_once_are_refused(sdim_bundle: Path, likes: Path, tmp_path: Path) -> None:
    job = settings(sdim_bundle, likes, tmp_path / "tables")
    open_store(job.store).close()
    (tmp_path / "link").symlink_to(tmp_path / "tables")
    with (
        only_writer(f"lmdb:{tmp_path / 'link'}"),
        pytest.raises(StoreError, match="tables; wait for it or stop it"),
    ):
        encode(job)
    encode(job)
    assert len(records(job.store, sdim_bundle)) == conftest.USERS


def test_tables_that_a_service_keeps_from_its_log_are_not_encoded_over(
    sdim_bundle: Path, likes: Path, tmp_path: Path
) -> None:
    with open_store(str(tmp_path / "tables")) as store:
        fingerprint, _ = add_model(Writer(store), sdim_bundle)
        with pytest.raises(StoreError, match="the BSE service keeps the tables of fingerprint"):
            encode(settings(sdim_bundle, likes, tmp_path / "tables"))
        assert list(store.users(fingerprint)) == []


def test_a_user_whose_table_overflows_is_named_and_all_others_are_encoded(
    shop_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = logs.shop(tmp_path / "raw")
    log = pl.read_parquet(tmp_path / "raw" / "purchases.parquet")
    outlier = (pl.col("household") == 107) & (pl.col("week") == logs.WEEKS)
    price = pl.when(outlier).then(1e9).otherwise("price").alias("price")
    log.with_columns(price).write_parquet(tmp_path / "raw" / "purchases.parquet")
    prepare(schema, tmp_path / "shop", shards=3)
    places = [f"--bundle={shop_bundle}", f"--data={tmp_path / 'shop'}", "--workers=0"]
    assert encode_users.main([*places, f"--store={tmp_path / 'tables'}", "--as_of=test"]) == 0
    assert 107 in records(tmp_path / "tables", shop_bundle)  # an older table, not to be kept
    capsys.readouterr()
    assert encode_users.main([*places, f"--store={tmp_path / 'tables'}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("no record of user")] == [
        "no record of user 107: a behaviour's vector has a component of 256 or more, or that "
        "is no number, which no table holds: look for an outlier in the numeric features of "
        "behaviours"
    ]
    assert f"{logs.USERS - 1} users" in said[0]
    found = records(tmp_path / "tables", shop_bundle)
    assert set(found) == set(log["household"]) - {107}
    reference = Reference(shop_bundle, shop_log(tmp_path / "shop"), shop_items(tmp_path / "shop"))
    end = reference.times()[-1] + 1
    del reference.log[107]
    assert found == from_log(reference, end)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--bundle must name the folder of a bundle"),
        (["--bundle={bundle}", "--data=nowhere"], "nowhere holds no finished data set"),
        (["--bundle=nowhere"], "nowhere holds no bundle"),
        (
            ["--bundle={bundle}", "--as_of=yesterday"],
            "or one of train, validation, test, got 'yest",
        ),
        (["--bundle={bundle}", "--as-of=test"], "did you mean --as_of?"),
        (["--bundle={bundle}", "--workers=-1"], "workers must not be negative, got -1"),
        (["--bundle={shop}"], "have no categorical side feature 'store', which the model reads"),
        (["--bundle={bundle}", "--store=file"], "file is a file and no store"),
        (
            ["--bundle={bundle}", "--store=file/tables"],
            "file/tables cannot be used: [Errno 20] Not a directory",
        ),
        (["--bundle={bundle}", "--store=s3://tables"], "store s3:// is not known"),
    ],
)
def test_what_cannot_be_encoded_ends_with_one_line(
    options: list[str],
    said: str,
    sdim_bundle: Path,
    shop_bundle: Path,
    likes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    given = [option.format(bundle=sdim_bundle, shop=shop_bundle) for option in options]
    assert encode_users.main([f"--data={likes}", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"file"}


def test_a_store_that_may_not_be_written_is_named(
    sdim_bundle: Path, likes: Path, tiny_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    options = [f"--bundle={sdim_bundle}", f"--data={likes}", f"--store={tiny_disk / 'tables'}"]
    assert encode_users.main([*options, "--workers=0"]) == 2
    assert "tables may not be written by this user: change its permissions" in (
        capsys.readouterr().err
    )


def test_users_of_another_type_are_refused(
    sdim_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = conftest.write_likes(tmp_path / "raw")
    for name in ("watched", "shown"):
        path = tmp_path / "raw" / f"{name}.parquet"
        pl.read_parquet(path).cast({"user": pl.String}).write_parquet(path)
    prepare(schema, tmp_path / "likes", shards=3)
    options = [f"--bundle={sdim_bundle}", f"--data={tmp_path / 'likes'}", "--workers=0"]
    assert encode_users.main([*options, f"--store={tmp_path / 'tables'}"]) == 2
    error = capsys.readouterr().err
    assert "users are text in " in error
    assert "the model knows them as whole numbers" in error


def test_a_bundle_or_data_that_changed_since_the_job_began_is_refused(
    sdim_bundle: Path, mean_bundle: Path, likes: Path, other_likes: Path, tmp_path: Path
) -> None:
    job = encode(settings(sdim_bundle, likes, tmp_path / "tables")).encoding
    with pytest.raises(BundleError, match="the job began with"):
        replace(job, bundle=str(mean_bundle))(0)
    with pytest.raises(DataError, match="the job began with"):
        replace(job, data=str(other_likes), as_of=0)(0)
