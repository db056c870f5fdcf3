"""The service over HTTP: what it takes, what it shows, and that an answer means durable."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from hashtab.serving.bse import group_commit
from hashtab.serving.bse.applying import Outcome
from hashtab.serving.bse.group_commit import GroupCommit, TooManyWaitingError
from hashtab.serving.bse.model import Model
from hashtab.serving.bse.service import BseService
from hashtab.serving.bse.settings import BseSettings
from hashtab.serving.bse.writer import Writer
from hashtab.serving.http import ServerSettings, build_app
from hashtab.serving.store import Event, StoreError, TableStore, open_store
from tests.serving.bse.conftest import events_of
from tests.serving.http.client import Client, Response
from tests.serving.store.servers import redis_server


@pytest.fixture
def client(url: str, shop_bundle: Path) -> Iterator[Client]:
    service = BseService(BseSettings(store=url, bundle=str(shop_bundle)))
    with Client(build_app(service, ServerSettings())) as client:
        yield client


def event(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"e{number}", "user": 1, "item": 7, "time": 1_000_000 + number} | more


def send(client: Client, *events: dict[str, Any]) -> Response:
    return client.post("/v1/events", {"events": events})


def test_what_was_answered_is_in_log_and_tables(client: Client, url: str, model: Model) -> None:
    answer = send(client, event(1), event(2), event(1))
    assert answer.json == {"accepted": 2, "duplicate": 1, "late": 0, "late_ids": []}
    with open_store(url, readonly=True) as store:
        assert [found.id for found in store.events(1)] == ["e1", "e2"]
        assert store.get(model.fingerprint, [1]) != [None]


def test_a_server_that_may_lose_events_is_warned_of(
    shop_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server(tmp_path) as socket:
        service = BseService(BseSettings(store=f"unix://{socket}", bundle=str(shop_bundle)))
        with Client(build_app(service, ServerSettings())):
            assert "may lose what was acknowledged: it keeps no log on disk" in caplog.text


def test_a_user_can_be_seen_and_forgotten(client: Client, url: str, model: Model) -> None:
    send(client, event(1), event(2, side={"store": 3, "price": 1.5}), event(3, user=2))
    seen = client.get("/v1/users/1").json
    assert (seen["user"], seen["events"]) == (1, 2)
    assert [e["id"] for e in seen["recent"]] == ["e2", "e1"]
    assert seen["recent"][0]["side"] == {"store": 3, "price": 1.5}
    assert seen["recent"][0]["time"] == "1970-01-01T00:00:01.000002Z"
    (table,) = seen["tables"]
    assert table["fingerprint"] == model.fingerprint.hex()
    assert table["behaviours"] == 2
    assert 0 < table["buckets_filled"] <= table["buckets"]
    assert client.request("DELETE", "/v1/users/1").json == {"events": 2, "tables": 1}
    assert client.get("/v1/users/1").status == 404
    assert client.request("DELETE", "/v1/users/1").status == 404
    with open_store(url, readonly=True) as store:
        assert store.events(1) == []
        assert store.get(model.fingerprint, [1]) == [None]
        assert [found.id for found in store.events(2)] == ["e3"]


def test_nothing_of_a_forgotten_user_is_left_under_any_model(
    client: Client, url: str, model: Model
) -> None:
    send(client, event(1))
    other = b"old ones"
    with open_store(url) as store:
        store.put(other, {1: b"record of another model", 2: b"of another user"})
    assert client.request("DELETE", "/v1/users/1").json == {"events": 1, "tables": 2}
    with open_store(url, readonly=True) as store:
        assert store.get(other, [1, 2]) == [None, b"of another user"]
        assert list(store.logged_users()) == []


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (event(1, user="7"), "events[0].user"),
        (event(1, user=2**63), "events[0].user"),
        (event(1, time=time.time_ns() // 1000 + 2 * 86_400 * 10**6), "events[0].time"),
        (event(1, time="tomorrow"), "events[0].time"),
        (event(1, time=2**60), "events[0].time"),
        (event(1, id=""), "events[0].id"),
        (event(1, item=None), "events[0].item"),
        (event(1, side={"store": [1]}), "events[0].side[...]"),
        (event(1, sied={}), "events[0].sied"),
    ],
)
def test_an_event_that_cannot_be_taken_is_named_and_nothing_of_its_request_is_written(
    wrong: dict[str, Any], field: str, client: Client, url: str
) -> None:
    answer = client.post("/v1/events", {"events": [wrong, event(2)]})
    assert answer.status == 422
    assert answer.json["field"] == field
    with open_store(url, readonly=True) as store:
        assert list(store.logged_users()) == []


def test_users_that_are_no_users_are_named(client: Client) -> None:
    for user in ("seven", str(2**64)):
        for method in ("GET", "DELETE"):
            answer = client.request(method, f"/v1/users/{user}")
            assert (answer.status, answer.json["field"]) == (422, "user")


def test_models_are_listed_and_one_that_cannot_be_kept_is_refused(
    client: Client, model: Model, tmp_path: Path
) -> None:
    (kept,) = client.get("/v1/models").json["models"]
    assert kept["fingerprint"] == model.fingerprint.hex()
    answer = client.post("/v1/models", {"bundle": str(tmp_path)})
    assert (answer.status, answer.json["field"]) == (409, "bundle")
    assert "holds no bundle" in answer.json["error"]
    for nothing in ("x" * 5000, "a\0b"):
        assert client.post("/v1/models", {"bundle": nothing}).status == 409
    again = client.post("/v1/models", {"bundle": kept["bundle"]})
    assert again.json["fingerprint"] == kept["fingerprint"]


def test_late_events_are_counted_and_named(url: str, shop_bundle: Path) -> None:
    settings = BseSettings(store=url, bundle=str(shop_bundle), count=2)
    with Client(build_app(BseService(settings), ServerSettings())) as client:
        send(client, event(5), event(6), event(7))
        assert send(client, event(1), event(8)).json == {
            "accepted": 1,
            "duplicate": 0,
            "late": 1,
            "late_ids": ["e1"],
        }


def test_with_the_store_away_nothing_is_lost_and_it_goes_on_when_it_is_back(
    tmp_path: Path, shop_bundle: Path
) -> None:
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    settings = BseSettings(store=f"unix://{tmp_path / 'socket'}", bundle=str(shop_bundle))
    with ExitStack() as stack:
        with redis_server(tmp_path, *durable):
            app = build_app(BseService(settings), ServerSettings())
            client = stack.enter_context(Client(app))
            assert send(client, event(1)).status == 200
        answer = send(client, event(2))
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert "not written, send them again" in answer.json["error"]
        wait_for_ready(client, 503)
        with redis_server(tmp_path, *durable):
            wait_for_ready(client, 200)
            assert send(client, event(1), event(2)).json["accepted"] == 1


def wait_for_ready(client: Client, status: int) -> None:
    deadline = time.monotonic() + 20
    while client.get("/health/ready").status != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)


class _Slow(Writer):
    """A writer that waits to be let on, and cannot write some events."""

    def __init__(self, store: TableStore) -> None:
        super().__init__(store)
        self.let_on = threading.Event()
        self.changes: list[int] = []

    def write(self, events: Sequence[Event], offsets: Any = None) -> list[Outcome]:
        self.let_on.wait(20)
        self.changes.append(len(events))
        if any(found.id == "event 3" for found in events):
            raise StoreError("not this one")
        return super().write(events, offsets)


def test_callers_at_the_same_time_share_a_change_and_only_the_guilty_one_fails(
    store: TableStore,
) -> None:
    writer = _Slow(store)
    commits = GroupCommit(writer)
    first, *others = events_of(1, 6, 0)
    answers = [commits.submit([first])]
    time.sleep(0.1)  # until the first one's change is under way
    answers += [commits.submit([one, one]) for one in others]
    writer.let_on.set()
    found = [answer.exception() or answer.result() for answer in answers]
    commits.stop()
    pair = [Outcome.ACCEPTED, Outcome.DUPLICATE]
    assert found[:3] == [[Outcome.ACCEPTED], pair, pair]
    assert str(found[3]) == "not this one"
    assert found[4:] == [pair, pair]
    assert writer.changes == [1, 10, 2, 2, 2, 2, 2]
    assert commits.waiting == 0


def test_who_no_longer_waits_takes_nothing_from_the_others(store: TableStore) -> None:
    writer = _Slow(store)
    commits = GroupCommit(writer)
    first, second, third = (commits.submit(events_of(user, 2, 0)) for user in (1, 2, 3))
    assert second.cancel()
    writer.let_on.set()
    assert first.result()
    assert third.result()
    commits.stop()
    assert commits.waiting == 0
    assert sorted(store.logged_users(), key=str) == [1, 3]
    with pytest.raises(TooManyWaitingError):
        commits.submit(events_of(4, 1, 0))


def test_a_store_that_hangs_is_answered_for_in_time(tmp_path: Path, shop_bundle: Path) -> None:
    with redis_server(tmp_path) as socket, ExitStack() as stack:
        settings = BseSettings(store=f"unix://{socket}", bundle=str(shop_bundle))
        app = build_app(BseService(settings), ServerSettings(deadline_ms=300))
        client = stack.enter_context(Client(app))
        with redis.Redis(unix_socket_path=str(socket)) as admin:
            process = psutil.Process(int(admin.info()["process_id"]))
            process.suspend()
            stack.callback(process.resume)
            answer = send(client, event(1))
            process.resume()
        assert answer.status == 503
        assert "send them again under the same ids" in answer.json["error"]
        assert sum(send(client, event(1)).json[name] for name in ("accepted", "duplicate")) == 1


def test_an_item_that_no_model_can_know_is_a_behaviour_all_the_same(
    client: Client, url: str
) -> None:
    items = ["9" * 30, "1_0", " 7", "-", 2**63 - 1]
    assert send(client, *(event(i, item=item) for i, item in enumerate(items))).json[
        "accepted"
    ] == len(items)
    assert client.get("/v1/users/1").json["tables"][0]["behaviours"] == len(items)


def test_times_long_past_are_taken_and_impossible_ones_named(client: Client) -> None:
    assert send(client, event(1, time=-5), event(2, time="1931-05-05")).status == 422
    old = event(1, time=-5), event(2, time="1931-05-05T00:00:00Z")
    assert send(client, *old).json["accepted"] == 2
    assert client.get("/v1/users/1").json["watermark"] is None
    assert send(client, event(3, time="0001-01-01T00:00:00Z")).json["field"] == "events[0].time"


def test_a_model_can_be_withdrawn_and_its_tables_go(client: Client, url: str, model: Model) -> None:
    send(client, event(1))
    name = model.fingerprint.hex()
    assert client.request("DELETE", f"/v1/models/{name}").status == 200
    deadline = time.monotonic() + 20
    while client.get("/v1/models").json["models"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with open_store(url, readonly=True) as store:
        assert list(store.users(model.fingerprint)) == []
        assert len(store.events(1)) == 1
    assert client.request("DELETE", f"/v1/models/{name}").status == 404
    assert client.request("DELETE", "/v1/models/all").status == 422


def test_more_than_can_be_written_soon_is_refused(
    store: TableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "WAITING", 3)
    writer = _Slow(store)
    commits = GroupCommit(writer)
    taken = [commits.submit(events_of(user, 2, 0)) for user in (1, 2)]
    with pytest.raises(TooManyWaitingError):
        commits.submit(events_of(3, 2, 0))
    writer.let_on.set()
    assert all(answer.result() for answer in taken)
    commits.stop()
    assert sorted(store.logged_users(), key=str) == [1, 2]
