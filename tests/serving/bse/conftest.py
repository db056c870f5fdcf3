"""A small model with all that a record can hold, events for it, and stores of both kinds."""

import random
from pathlib import Path

import pytest

from hashtab.serving.bse.model import Model
from hashtab.serving.store import Event, pack, unpack
from tests.pipelines.bundles import shop_bundle, shop_data
from tests.serving.store.conftest import empty_server, server, store, url

__all__ = ["empty_server", "server", "shop_bundle", "shop_data", "store", "url"]


@pytest.fixture(scope="session")
def model(shop_bundle: Path) -> Model:
    return Model.open(shop_bundle)


def written_whole(data: bytes | None, model: Model) -> bytes | None:
    """A record as a store gives it, as the bytes of one that was written at once."""
    return None if data is None else pack(unpack(data, model.layout), model.layout)


def events_of(user: int, count: int, seed: int) -> list[Event]:
    """Events of one user up to the moment 1,000, several of one moment, some of unknown things."""
    chance = random.Random(f"{count} {seed}")
    return [
        Event(
            user=user,
            id=f"event {i}",
            time=chance.randint(975, 1_000),
            item=chance.randint(0, 45),
            side={"store": chance.choice([1, 2, "3", None, "none"]), "price": chance.random() * 9},
        )
        for i in range(count)
    ]
