"""Several processes at once, and processes that die: nothing acknowledged is lost, nothing torn."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest
import redis

from hashtab.serving.store import TableStore, lmdb_store, open_store, unpack
from tests.serving.store.records import FINGERPRINT, LAYOUT
from tests.serving.store.writer import BATCH, RECORD

ROOT = Path(__file__).parents[3]
WIDE = replace(LAYOUT, size=RECORD)
KILLS, FEW_KILLS = 10, 3  # a Redis client holds nothing that its death could tear


@contextmanager
def writer(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "tests.serving.store.writer", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: "subprocess.Popen[str]") -> Iterator[int]:
    """Numbers acknowledged; the kill may have cut the last line short."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.endswith("\n"):
            yield int(line)


@contextmanager
def arrived(url: str) -> Iterator[None]:
    """Wait at the end for what a killed client of a Redis server had sent: it is still run."""
    if url.startswith("lmdb"):
        yield
        return
    with redis.Redis.from_url(url) as server:
        before = {client["id"] for client in server.client_list()}
        yield
        while {client["id"] for client in server.client_list()} - before:
            time.sleep(0.001)


def revisions(store: TableStore, users: range) -> list[int | None]:
    """The one number that each whole record holds."""
    found: list[int | None] = []
    for data in store.get(FINGERPRINT, users):
        record = None if data is None else unpack(data, WIDE)
        if record is not None:
            assert (record.table == record.revision).all()
        found.append(None if record is None else record.revision)
    return found


def test_a_killed_writer_loses_nothing_acknowledged(url: str) -> None:
    chance = random.Random(0)
    whole = 0
    with open_store(url) as store:
        for _ in range(KILLS if url.startswith("lmdb") else FEW_KILLS):
            with arrived(url), writer("append", url) as process:
                acknowledged = next(lines(process))
                time.sleep(chance.random() * 0.1)
                process.kill()
                acknowledged = max(lines(process), default=acknowledged)
            last = int(store.note(FINGERPRINT, "last") or -1)
            assert acknowledged <= last <= acknowledged + 1
            users = range(whole, (last + 1) * BATCH)
            assert revisions(store, users) == list(users)
            whole = users.stop
            assert store.counts() == {FINGERPRINT: whole}


def test_a_reader_sees_each_put_whole_while_two_write(url: str) -> None:
    with open_store(url) as store, writer("replace", url) as one, writer("replace", url) as two:
        assert [next(lines(process)) for process in (one, two)] == [0, 0]
        seen = set()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            found = set(revisions(store, range(BATCH)))
            assert len(found) == 1
            seen |= found
        assert len(seen) > 5


def test_the_map_grows_under_several_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_store, "FIRST_MAP_BYTES", 1 << 18)
    url = str(tmp_path / "store")
    with open_store(url) as store, writer("grow", url, "1") as one, writer("grow", url, "2") as two:
        for _ in range(100):
            store.put(FINGERPRINT, {"0": b"a"})  # picks up what the others have enlarged
        assert [list(lines(process)) for process in (one, two)] == [list(range(100))] * 2
        assert [process.wait() for process in (one, two)] == [0, 0]
        assert store.counts() == {FINGERPRINT: 201}
        for user, data in store.items(FINGERPRINT):
            number = int(str(user).split()[-1])
            assert user == "0" or unpack(data, WIDE).revision == number


def test_a_store_opens_while_another_process_enlarges_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(str(tmp_path)) as store:
        store.put(FINGERPRINT, {"0": b"a"})
    opened = lmdb.open
    enlarged = iter([lmdb.MapResizedError("what", 0), lmdb.MapResizedError("what", 0)])

    def open_late(*args: Any, **kwargs: Any) -> "lmdb.Environment":
        for error in enlarged:
            raise error
        return opened(*args, **kwargs)

    monkeypatch.setattr(lmdb, "open", open_late)
    with open_store(str(tmp_path)) as store:
        assert store.get(FINGERPRINT, ["0"]) == [b"a"]
