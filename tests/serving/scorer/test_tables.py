"""A store that is slow, away or holds rubbish degrades answers, which say so, until it is back."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hashtab.serving.bundle import Bundle
from hashtab.serving.scorer.champion import Served
from hashtab.serving.scorer.tables import History, Tables
from hashtab.serving.store import RecordLayout, StoreError, UserRecord, open_store, pack
from tests.serving.scorer.servers import Server, scorer, wait_for
from tests.serving.store.servers import redis_server

ASKED = {"user": 100, "items": [7, 14], "context": {"display": "d1"}, "time": 0}


@pytest.fixture(scope="module")
def served(shop_bundle: Path) -> Served:
    return Served.open(shop_bundle)


@pytest.fixture
def layout(served: Served) -> RecordLayout:
    return served.layout


def record(layout: RecordLayout) -> bytes:
    return pack(UserRecord.empty(layout), layout)


def looked(url: str | None, served: Served) -> Tables:
    """Tables whose store was looked at once."""
    tables = Tables(url, 0.05)
    if url is not None:
        asyncio.run(tables.look(served))
    return tables


def read(url: str, served: Served, user: int) -> History:
    tables = looked(url, served)
    try:
        return tables.history(served, user)
    finally:
        tables.close()


def test_a_table_is_read(served: Served, shop_store: Path) -> None:
    found = read(str(shop_store), served, 100)
    assert (found.source, found.degraded) == ("table", None)
    assert found.record.behaviours > 0


@pytest.mark.parametrize("server", ["lmdb", "redis"])
def test_a_missing_table_is_told_from_a_model_without_tables(
    served: Served, layout: RecordLayout, tmp_path: Path, server: str
) -> None:
    with redis_server(tmp_path) as socket:
        url = str(tmp_path / "lmdb") if server == "lmdb" else f"unix://{socket}"
        with open_store(url) as store:
            assert read(url, served, 1).degraded == "no_table"
            store.put(layout.fingerprint, {2: record(layout)})
            assert read(url, served, 1).degraded == "unknown_user"
            assert read(url, served, 2).degraded is None


def test_a_corrupt_table_is_not_read(served: Served, layout: RecordLayout, tmp_path: Path) -> None:
    good = record(layout)
    with open_store(str(tmp_path)) as store:
        store.put(layout.fingerprint, {1: good[:-1] + bytes([good[-1] ^ 1]), 2: good[:20], 3: b""})
    assert [read(str(tmp_path), served, user).degraded for user in (1, 2, 3)] == [
        "corrupt_table"
    ] * 3


def test_a_table_of_another_model_is_not_read(
    served: Served, layout: RecordLayout, tmp_path: Path
) -> None:
    others = replace(layout, fingerprint=b"\7" * 8)
    with open_store(str(tmp_path)) as store:
        store.put(layout.fingerprint, {1: record(others)})
    assert read(str(tmp_path), served, 1).degraded == "foreign_table"


def test_a_model_that_reads_no_history_is_never_degraded(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "reads_history", False)
    assert Tables(None, 0.05).history(served, None).degraded is None


def test_without_a_store_every_history_is_empty(served: Served) -> None:
    found = looked(None, served).history(served, 100)
    assert (found.source, found.degraded, found.record) == ("empty", "no_table", served.empty)


class Broken:
    """A store that opens and answers nothing, after a while."""

    name = "broken"

    def __init__(self, after_s: float) -> None:
        self.after_s, self.asked = after_s, 0

    def get(self, *_: object) -> list[bytes | None]:
        self.asked += 1
        time.sleep(self.after_s)
        raise StoreError("broken does not answer")


@pytest.mark.parametrize(("after_s", "reason"), [(0.0, "store_away"), (0.06, "store_slow")])
def test_a_store_that_fails_is_soon_not_asked_any_more(
    served: Served, monkeypatch: pytest.MonkeyPatch, after_s: float, reason: str
) -> None:
    tables, broken = Tables("somewhere", 0.05), Broken(after_s)
    monkeypatch.setattr(tables, "_store", broken)
    assert {tables.history(served, 100).degraded for _ in range(20)} == {reason}
    assert broken.asked == 3
    assert tables.problem == "broken does not answer"


@pytest.fixture
def redis(shop_bundle: Path, shop_store: Path, tmp_path: Path) -> Iterator[tuple[Any, Server]]:
    """A scorer on a real Redis with the shop's tables, and a way to start that anew."""
    folder = tmp_path / "redis"
    folder.mkdir()
    layout = Bundle.open(shop_bundle).layout

    def start() -> Any:
        (folder / "socket").unlink(missing_ok=True)  # a killed one leaves it
        opened = redis_server(folder)
        url = f"unix://{opened.__enter__()}"
        with open_store(url) as store, open_store(str(shop_store), readonly=True) as kept:
            store.put(layout.fingerprint, dict(kept.items(layout.fingerprint)))
        return opened

    first = start()
    options = ("--bundle", shop_bundle, "--store", f"unix://{folder / 'socket'}")
    with scorer(tmp_path / "scorer", *options, "--store-deadline-ms", 100) as server:
        wait_for(lambda: degraded(server) is None)
        yield (folder, first, start), server


def degraded(server: Server) -> str | None:
    answer = server.score(**ASKED)
    assert (answer["history"] == "table") == (answer["degraded"] is None)
    found: str | None = answer["degraded"]
    return found


def pid_of(folder: Path) -> int:
    """The server whose log names its process."""
    return int((folder / "log").read_text().split(":", 1)[0])


def test_a_redis_that_hangs_or_dies_degrades_answers_until_it_is_back(
    redis: tuple[Any, Server],
) -> None:
    (folder, first, start), server = redis
    pid = pid_of(folder)
    os.kill(pid, signal.SIGSTOP)
    assert degraded(server) == "store_slow"
    assert server.ask("GET", "/health/ready").status == 200
    assert [degraded(server) for _ in range(10)] == ["store_slow"] * 10
    assert server.metric('hashtab_scorer_tables_total{outcome="failed"}') <= 3
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: degraded(server) is None)
    first.__exit__(None, None, None)  # kills it
    assert degraded(server) == "store_away"
    assert "does not answer" in server.models()["store_problem"]
    second = start()
    try:
        wait_for(lambda: degraded(server) is None)
        assert server.models()["store_problem"] is None
    finally:
        second.__exit__(None, None, None)


def test_a_store_that_is_made_or_replaced_later_is_found(
    shop_bundle: Path, shop_store: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with scorer(tmp_path / "scorer", "--bundle", shop_bundle, "--store", store) as server:
        assert degraded(server) == "store_away"
        assert any("scored with empty histories" in event for event in server.events())
        shutil.copytree(shop_store, store)
        wait_for(lambda: degraded(server) is None)
        store.rename(tmp_path / "old")
        with open_store(str(store)):
            wait_for(lambda: degraded(server) == "unknown_user")
