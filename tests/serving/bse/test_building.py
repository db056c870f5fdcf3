"""A new model's tables are built from the log while events go on coming, and none is missed."""

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hashtab.features.dataset import Dataset
from hashtab.serving.bse import building
from hashtab.serving.bse.applying import Outcome, from_log
from hashtab.serving.bse.building import add_model, build, retire, start_with, withdraw
from hashtab.serving.bse.model import Model
from hashtab.serving.bse.users import forget
from hashtab.serving.bse.writer import Writer
from hashtab.serving.store import Event, StoreError, TableStore, open_store
from tests.pipelines.bundles import export_bundle, small_model
from tests.serving.bse.conftest import events_of, written_whole

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
        assert written_whole(record, model) == expected


def done(_: int) -> None:
    pass


def always() -> bool:
    return True


def test_a_model_of_an_empty_log_gets_tables_as_events_come(
    store: TableStore, writer: Writer, shop_bundle: Path
) -> None:
    fingerprint, kept = add_model(writer, shop_bundle)
    assert kept.state == "building"
    assert build(writer, fingerprint, done, always)
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
    assert build(writer, fingerprint, done, always)
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
    build(writer, old, done, always)
    writer.write(all_events())
    new, _ = add_model(writer, other_bundle)
    looks = iter([True, False])
    assert not build(writer, new, done, lambda: next(looks))
    assert len(list(store.users(new))) == 10
    assert store.kept_models()[new].state == "building"
    assert store.kept_models()[old].state == "live"
    assert build(writer, new, done, always)
    states = {fingerprint: kept.state for fingerprint, kept in store.kept_models().items()}
    assert states == {old: "retiring", new: "live"}
    assert retire(writer, 10**12, always) == []
    more = [replace(event, id=f"more {event.id}") for event in all_events()[:40]]
    writer.write(more)
    check_tables(store, shop_bundle, all_events() + more)  # still kept: a scorer may read it
    check_tables(store, other_bundle, all_events() + more)
    assert retire(writer, 0, always) == [old]
    assert store.kept_models().keys() == {new}
    assert list(store.users(old)) == []


def test_a_model_that_comes_back_before_its_tables_are_gone_is_live_at_once(
    store: TableStore, writer: Writer, shop_bundle: Path, other_bundle: Path
) -> None:
    first, _ = add_model(writer, shop_bundle)
    build(writer, first, done, always)
    second, _ = add_model(writer, other_bundle)
    build(writer, second, done, always)
    assert add_model(writer, shop_bundle)[1].state == "live"
    states = {fingerprint: kept.state for fingerprint, kept in store.kept_models().items()}
    assert states == {first: "live", second: "retiring"}
    assert retire(writer, 0, always) == [second]


def test_a_build_is_for_nothing_once_the_old_model_is_wanted_again(
    store: TableStore, writer: Writer, shop_bundle: Path, other_bundle: Path
) -> None:
    writer.write(all_events())
    old, _ = add_model(writer, shop_bundle)
    build(writer, old, done, always)
    new, _ = add_model(writer, other_bundle)
    add_model(writer, shop_bundle)  # the alias is moved back
    assert not build(writer, new, done, always)
    assert store.kept_models()[old].state == "live"
    assert retire(writer, 10**12, always) == [new]
    assert store.kept_models().keys() == {old}
    assert list(store.users(new)) == []


def test_a_drop_that_was_stopped_goes_on_and_nobody_adds_to_it_meanwhile(
    store: TableStore, writer: Writer, shop_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_USERS_AT_ONCE", 10)
    writer.write(all_events())
    fingerprint, _ = add_model(writer, shop_bundle)
    build(writer, fingerprint, done, always)
    assert withdraw(writer, fingerprint)
    looks = iter([True, False])
    assert retire(writer, 0, lambda: next(looks)) == []
    assert len(list(store.users(fingerprint))) == 20
    writer.write([replace(all_events()[0], id="one more")])
    assert len(list(store.users(fingerprint))) == 20
    with pytest.raises(StoreError, match="are being dropped: try again when they are gone"):
        add_model(writer, shop_bundle)
    assert retire(writer, 0, always) == [fingerprint]
    assert list(store.users(fingerprint)) == []
    assert add_model(writer, shop_bundle)[1].state == "building"


def test_a_service_started_again_does_not_bring_back_what_was_replaced(
    store: TableStore, writer: Writer, shop_bundle: Path, other_bundle: Path
) -> None:
    start_with(writer, shop_bundle)
    build(writer, Model.open(shop_bundle).fingerprint, done, always)
    new, _ = add_model(writer, other_bundle)
    build(writer, new, done, always)
    start_with(writer, shop_bundle)
    assert store.plan().wanted == new.hex()
    start_with(writer, other_bundle)
    start_with(writer, shop_bundle)  # another one than the last time: that is meant
    assert store.plan().wanted != new.hex()


def test_a_forgotten_users_table_of_a_model_that_came_meanwhile_goes_too(
    store: TableStore, writer: Writer, shop_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.write(all_events())

    def fingerprints() -> list[bytes]:
        build(writer, add_model(writer, shop_bundle)[0], done, always)
        return []

    monkeypatch.setattr(store, "fingerprints", fingerprints)
    assert forget(store, 3) is not None
    fingerprint = Model.open(shop_bundle).fingerprint
    assert store.get(fingerprint, [3]) == [None]
    with store.reading() as log:
        assert log.heads([3]) == [None]
        assert log.known(events_of(3, 15, 3)) == [False] * 15
    assert len(list(store.users(fingerprint))) == 29


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
