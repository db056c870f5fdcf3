"""Files and streams come into the log once, whatever is cut short in between."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import redis

from hashtab.serving.bse import replay as replaying
from hashtab.serving.bse import stream
from hashtab.serving.bse.__main__ import main
from hashtab.serving.bse.applying import Outcome
from hashtab.serving.bse.group_commit import GroupCommit
from hashtab.serving.bse.replay import ReplaySettings, replay
from hashtab.serving.bse.settings import StreamSettings
from hashtab.serving.bse.stream import StreamSource
from hashtab.serving.bse.writer import Writer
from hashtab.serving.errors import RequestError
from hashtab.serving.store import Event, TableStore

ROWS = pl.DataFrame(
    {
        "user": [2, 1, 1, 2, 1],
        "product": [7, 7, 8, 9, 7],
        "at": [30, 20, 10, 5, 20],
        "store": ["a", "b", None, "a", "b"],
    }
)


def settings(path: Path, **more: Any) -> ReplaySettings:
    return ReplaySettings(
        files=str(path), user="user", item="product", time="at", time_unit="s", **more
    )


def test_files_are_replayed_once_in_the_order_of_time(store: TableStore, tmp_path: Path) -> None:
    ROWS.write_parquet(tmp_path / "rows.parquet")
    asked = settings(tmp_path / "*.parquet", side=("store",))
    assert replay(asked, store)[Outcome.ACCEPTED] == 5
    events = store.events(1)
    assert [event.item for event in events] == [8, 7, 7]
    assert [event.time for event in events] == [10**7, 2 * 10**7, 2 * 10**7]
    assert [event.side for event in events] == [{"store": None}, {"store": "b"}, {"store": "b"}]
    assert sum(replay(asked, store).values()) == 0


def test_a_replay_that_was_stopped_goes_on_where_it_was(
    store: TableStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ROWS.write_csv(tmp_path / "rows.csv")
    monkeypatch.setattr(replaying, "_ROWS", 2)
    write, calls = Writer.write, iter([True, False])

    def stop_after_one(self: Writer, *given: Any) -> list[Outcome]:
        if not next(calls):
            raise KeyboardInterrupt
        return write(self, *given)

    monkeypatch.setattr(Writer, "write", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        replay(settings(tmp_path / "rows.csv"), store)
    monkeypatch.setattr(Writer, "write", write)
    assert replay(settings(tmp_path / "rows.csv"), store)[Outcome.ACCEPTED] == 3
    assert len(store.events(1)) + len(store.events(2)) == 5


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (ROWS.drop("at"), "has no column at; it has user, product, store"),
        (ROWS.with_columns(at=pl.lit("soon")), "column 'at' must hold times or whole numbers"),
        (ROWS.with_columns(at=pl.lit(None, pl.Int64)), "row 1 of .* has no at that can be read"),
        (ROWS.with_columns(user=pl.lit(1.5)), "column 'user' must hold whole numbers or text"),
        (ROWS.with_columns(at=pl.lit(1.5)), "column 'at' must hold times or whole numbers"),
        (ROWS.with_columns(product=None), "row 1 of .* has no product"),
    ],
)
def test_files_that_hold_no_events_are_refused_before_anything_is_written(
    frame: pl.DataFrame, said: str, store: TableStore, tmp_path: Path
) -> None:
    frame.write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(RequestError, match=said):
        replay(settings(tmp_path / "rows.parquet"), store)
    assert list(store.logged_users()) == []


def test_the_command_replays_and_says_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ROWS.write_parquet(tmp_path / "rows.parquet")
    given = [f"--store={tmp_path / 'store'}", f"--files={tmp_path}", "--user=user"]
    asked = ["replay", *given, "--item=product", "--time-unit=s"]
    assert main([*asked, "--time=at"]) == 0
    said = capsys.readouterr()
    assert "5 accepted, 0 duplicate, 0 late of this run\nnext: " in said.out
    assert "5 behaviours from 1970-01-01T00:00:05Z to 1970-01-01T00:00:30Z" in said.err
    assert main([*asked[:-1], "--time=at"]) == 2
    assert "say by --time-unit whether they count" in capsys.readouterr().err
    assert main([*asked, "--time=when"]) == 2
    assert capsys.readouterr().err.endswith("it has user, product, at, store\n")


def entry(i: int, **more: Any) -> dict[str, str]:
    return {"event": json.dumps({"id": f"e{i}", "user": 1, "item": 7, "time": i, **more})}


@pytest.fixture
def client(empty_server: Path) -> Iterator[Any]:
    with redis.Redis(unix_socket_path=str(empty_server)) as opened:
        yield opened


class Sourced:
    """A running stream source over a store."""

    def __init__(self, client: Any, store: TableStore) -> None:
        self.client = client
        self.store = store
        path = client.connection_pool.connection_kwargs["path"]
        writer = Writer(store)
        self.commits = GroupCommit(writer)
        self.source = StreamSource(StreamSettings(url=f"unix://{path}"), self.commits, writer)

    def stop(self) -> None:
        self.source.stop()
        self.commits.stop()

    def pending(self) -> int:
        return int(self.client.xpending("events", "hashtab")["pending"])


@pytest.fixture
def sourced(client: Any, store: TableStore) -> Iterator[Sourced]:
    running = Sourced(client, store)
    yield running
    running.stop()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_entries_become_events_and_are_acknowledged_when_durable(sourced: Sourced) -> None:
    for i in range(10):
        sourced.client.xadd("events", entry(i % 8))
    wait_for(lambda: len(sourced.store.events(1)) == 8)
    wait_for(lambda: sourced.pending() == 0)


def test_entries_of_a_consumer_that_died_are_taken_over(
    client: Any, store: TableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        client.xadd("events", entry(i))
    client.xgroup_create("events", "hashtab", id="0")
    client.xreadgroup("hashtab", "dead", {"events": ">"}, count=4)
    store.change([1], lambda change: change.add([Event(user=1, id="e0", time=0, item=7)]))
    monkeypatch.setattr(stream, "_IDLE_MS", 0)
    running = Sourced(client, store)
    wait_for(lambda: running.pending() == 0 and len(store.events(1)) == 6)
    running.stop()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"event": "{"}, b"truncated"),
        ({"other": "1"}, b"no field 'event'"),
        (entry(1, user=""), b"$.user"),
        (entry(1, time="soon"), b"$.time"),
        (entry(1, time=2**52), b"a day ahead"),
    ],
)
def test_what_is_no_event_is_put_aside_with_the_reason_and_holds_nothing_up(
    fields: dict[str, str], reason: bytes, sourced: Sourced
) -> None:
    sourced.client.xadd("events", fields)
    sourced.client.xadd("events", entry(5))
    wait_for(lambda: [event.id for event in sourced.store.events(1)] == ["e5"])
    wait_for(lambda: sourced.pending() == 0)
    ((_, aside),) = sourced.client.xrange("events:rejected")
    assert reason in aside[b"reason"]
    assert aside.keys() >= {name.encode() for name in fields}
