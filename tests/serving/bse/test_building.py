"""A new model's tables are built from the log while events go on coming, and none is missed."""

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hashtab.features.dataset import Dataset
from hashtab.serving.bse import building
from hashtab.serving.bse.applying import Outcome, from_log
from hashtab.serving.bse.building import add_model, build, retire
from hashtab.serving.bse.model import Model
from hashtab.serving.bse.writer import Writer
from hashtab.serving.store import Event, StoreError, TableStore, open_store
from tests.pipelines.bundles import export_bundle, small_model
from tests.serving.bse.conftest import events_of

USERS = range(30)


@pytest.fixture(scope="session")
def other_bundle(shop_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of other planes and embeddings than `shop_bundle`."""
    dataset = Dataset.open(shop_data)
    model = small_model(dataset, "sdim_long_short", counters=True, seed=1)
    return export_bundle(tmp_path_factory.mktemp("other") / "other-run", model, dataset)


@pytest.fixture
def writer(store: TableStore) -> Writer:
    return Writer(store)


def all_events() -> list[Event]:
    return [event for user in USERS for event in events_of(user, 15, user)]


def check_tables(store: TableStore, folder: Path, events: list[Event]) -> None:
    """Every user's table is what a rebuild from all events comes to."""
    model = Model.open(folder)
    for user in {event.user for event in events}:
        mine = [event for event in events if event.user == user]
        with store.reading() as log:
            (head,), (record,) = log.heads([user]), log.records(model.fingerprint, [user])
        assert head is not None
        expected = from_log(model, user, mine, head)
        assert record is not None
        assert expected is not None
        # A record that was built counts its writes from then on: the bytes after them are equal.
        assert record[24 + 8 :] == expected[24 + 8 :]


def done(_: int) -> None:
    pass


def test_a_model_of_an_empty_log_gets_tables_as_events_come(
    store: TableStore, writer: Writer, shop_bundle: Path
) -> None:
    fingerprint, kept = add_model(writer, shop_bundle)
    assert kept.state == "building"
    assert build(writer, fingerprint, done, lambda: True)
    assert store.kept_models()[fingerprint].state == "live"
    writer.write(all_events())
    check_tables(store, shop_bundle, all_events())


def test_a_build_misses_no_event_that_comes_meanwhile(
    url: str, store: TableStore, writer: Writer, shop_bundle: Path, other_bundle: Path
) -> None:
    events = all_events()
    random.Random(0).shuffle(events)
    add_model(writer, shop_bundle)
    half = len(events) // 2
    writer.write(events[:half])
    fingerprint, _ = add_model(writer, other_bundle)

    def go_on_writing() -> None:
        with open_store(url) as opened:
            other = Writer(opened)
            for start in range(half, len(events), 5):
                other.write(events[start : start + 5])

    writing = threading.Thread(target=go_on_writing)
    writing.start()
    assert build(writer, fingerprint, done, lambda: True)
    writing.join()
    check_tables(store, other_bundle, events)


def test_a_build_that_was_stopped_goes_on_and_the_old_model_retires_after_it(
    store: TableStore,
    writer: Writer,
    shop_bundle: Path,
    other_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(building, "_USERS_AT_ONCE", 10)
    old, _ = add_model(writer, shop_bundle)
    build(writer, old, done, lambda: True)
    writer.write(all_events())
    new, _ = add_model(writer, other_bundle)
    looks = iter([True, False])
    assert not build(writer, new, done, lambda: next(looks))
    assert len(list(store.users(new))) == 10
    assert store.kept_models()[new].state == "building"
    assert store.kept_models()[old].state == "live"
    assert build(writer, new, done, lambda: True)
    states = {fingerprint: kept.state for fingerprint, kept in store.kept_models().items()}
    assert states == {old: "retiring", new: "live"}
    assert retire(writer, 10**12) == []
    more = [replace(event, id=f"more {event.id}") for event in all_events()[:40]]
    writer.write(more)
    check_tables(store, shop_bundle, all_events() + more)  # still kept: a scorer may read it
    check_tables(store, other_bundle, all_events() + more)
    assert retire(writer, 0) == [old]
    assert store.kept_models().keys() == {new}
    assert list(store.users(old)) == []


def test_a_model_that_comes_back_before_its_tables_are_gone_is_live_at_once(
    store: TableStore, writer: Writer, shop_bundle: Path, other_bundle: Path
) -> None:
    first, second = (add_model(writer, folder)[0] for folder in (shop_bundle, other_bundle))
    for fingerprint in (first, second):
        build(writer, fingerprint, done, lambda: True)
    assert add_model(writer, shop_bundle)[1].state == "live"
    states = {fingerprint: kept.state for fingerprint, kept in store.kept_models().items()}
    assert states == {first: "live", second: "retiring"}
    assert retire(writer, 0) == [second]


def test_tables_that_are_not_of_the_log_are_refused(
    store: TableStore, writer: Writer, shop_bundle: Path
) -> None:
    fingerprint = Model.open(shop_bundle).fingerprint
    store.put(fingerprint, {7: b"of encode_users.py"})
    with pytest.raises(StoreError, match="not built from its event log: name another store, or d"):
        add_model(writer, shop_bundle)
    assert store.kept_models() == {}


def fails(*_: object) -> None:
    raise StoreError("on the way")


def test_offsets_are_written_with_their_events_or_not_at_all(
    store: TableStore, writer: Writer, shop_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(writer, shop_bundle)
    events = all_events()
    assert set(writer.write(events[:3], {"source": b"3"})) == {Outcome.ACCEPTED}
    monkeypatch.setattr(Model, "encode", fails)
    with pytest.raises(StoreError, match="on the way"):
        writer.write(events[3:6], {"source": b"6"})
    with store.reading() as log:
        assert log.value("source") == b"3"
    assert len(store.events(events[0].user)) == 3
