"""A shop whose tables a BSE keeps from its event log, with an index of items and their names."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from hashtab.features.dataset import Dataset
from hashtab.pipelines.build_index import IndexSettings, build
from hashtab.pipelines.encoding import moment
from hashtab.pipelines.past_events import write_events
from hashtab.serving.bse import building
from hashtab.serving.bse.replay import ReplaySettings, replay
from hashtab.serving.bse.writer import Writer
from hashtab.serving.bundle import Bundle
from hashtab.serving.store import Event, UserRecord, open_store, unpack
from tests.serving.scorer.servers import Server, scorer, wait_for

NEW = 100  # a user without any event


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Where everything of the shop lies.

    Args:
        bundle: folder, with its index beside it.
        store: folder.
        names: CSV file; most items have a name.
    """

    bundle: Path
    store: Path
    names: Path

    def record(self, user: int) -> UserRecord:
        layout = Bundle.open(self.bundle).layout
        with open_store(str(self.store), readonly=True) as store:
            (data,) = store.get(layout.fingerprint, [user])
        assert data is not None
        return unpack(data, layout)

    def events(self, user: int) -> list[Event]:
        with open_store(str(self.store), readonly=True) as store:
            return store.events(user)


@pytest.fixture(scope="session")
def kept(shop_bundle: Path, shop_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("kept")
    bundle = shutil.copytree(shop_bundle, folder / "bundle")
    build(IndexSettings(bundle=str(bundle), data=str(shop_data), as_of="test"))
    write_log(shop_data, bundle, folder / "tables")
    items = Bundle.open(bundle).catalogue.items
    named = items.filter(items != 7)
    pl.DataFrame({"item": named, "name": [f"Product {i}" for i in named]}).write_csv(
        folder / "names.csv"
    )
    return Kept(bundle=bundle, store=folder / "tables", names=folder / "names.csv")


def write_log(data: Path, bundle: Path, store: Path) -> None:
    """Let a BSE take all events before the test split, of all users but `NEW`."""
    events = store.with_name("events.parquet")
    side = write_events(data, events)
    past = pl.read_parquet(events)
    before = pl.col("time") < moment(Dataset.open(data), "test")
    past.filter(before, pl.col("user") != NEW).write_parquet(events)
    with open_store(str(store)) as opened:
        writer = Writer(opened)
        fingerprint, _ = building.add_model(writer, bundle)
        building.build(writer, fingerprint, lambda _: None, lambda: True)
        replay(
            ReplaySettings(
                files=str(events),
                user="user",
                item="item",
                time="time",
                time_unit="us",
                side=side,
            ),
            opened,
        )


@pytest.fixture(scope="module")
def shop(kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A scorer of the shop that no test changes."""
    options = ("--bundle", kept.bundle, "--store", kept.store, "--names", kept.names)
    with scorer(tmp_path_factory.mktemp("shop"), *options) as running:
        # Until it has looked through the store it cannot tell whether anyone has a table.
        wait_for(lambda: running.score(user=NEW, items=[])["degraded"] == "unknown_user")
        yield running
