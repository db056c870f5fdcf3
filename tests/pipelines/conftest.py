"""A small synthetic log with a signal to learn, and what is made once for all tests."""

import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from hashtab.features.dataset import Dataset
from hashtab.features.prepare import prepare
from hashtab.features.schema import Behaviours, Context, Exposures, Items, Schema, Split
from hashtab.models.ctr import ClickModelSettings
from hashtab.pipelines.settings import OptimiserSettings, TrainSettings
from tests.pipelines.bundles import (
    din_bundle,
    fitted_bundle,
    long_short_bundle,
    mean_bundle,
    none_bundle,
    sdim_bundle,
    shop_bundle,
    shop_data,
)
from tests.pipelines.tables import churn_bundle, customers_file

# Fixtures that live in a file of their own; pytest finds them by these names.
__all__ = [
    "churn_bundle",
    "customers_file",
    "din_bundle",
    "fitted_bundle",
    "long_short_bundle",
    "mean_bundle",
    "none_bundle",
    "sdim_bundle",
    "shop_bundle",
    "shop_data",
]

# Ray's workers give way to all else, which other processes of tests make last for minutes.
NICENESS = "RAY_worker_niceness"
os.environ.setdefault(NICENESS, "0")

USERS, ITEMS, KINDS, DAYS = 60, 50, 5, 40
START = datetime(2024, 1, 1)

SMALL_MODEL = ClickModelSettings(
    embedding_size=8, planes=12, tau=3, history_limit=50, hidden=(16,), dropout=0.1
)
SMALL_OPTIMISER = OptimiserSettings(
    learning_rate=1e-2,
    embedding_learning_rate=5e-2,
    epochs=4,
    patience=4,
    samples_per_batch=64,
)


def environment_outside_ray() -> dict[str, str]:
    """Return what a script starts with that knows of no cluster of these tests."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k == NICENESS}


def write_likes(folder: Path, seed: int = 0) -> Schema:
    """Write a log of users who each like one kind of item and respond to it when they see it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    liked = rng.integers(0, KINDS, USERS)
    _events(rng, liked, 40, 0.8).drop("response").write_parquet(folder / "watched.parquet")
    _events(rng, liked, 40, 1 / KINDS).write_parquet(folder / "shown.parquet")
    kinds = pl.DataFrame({"item": np.arange(ITEMS), "kind": np.arange(ITEMS) % KINDS})
    kinds.write_parquet(folder / "items.parquet")
    return Schema(
        name="likes",
        behaviours=Behaviours(
            files=str(folder / "watched.parquet"), user="user", item="item", time="at"
        ),
        exposures=Exposures(
            files=str(folder / "shown.parquet"),
            user="user",
            item="item",
            time="at",
            label="response",
        ),
        items=Items(files=str(folder / "items.parquet"), item="item", categorical=("kind",)),
        context=Context(time=("weekday",)),
        counters=("item", "kind"),
        split=Split(train_until="2024-01-26", validate_until="2024-02-01"),
    )


def _events(
    rng: np.random.Generator, liked: np.ndarray, per_user: int, share_liked: float
) -> pl.DataFrame:
    user = np.repeat(np.arange(USERS), per_user)
    other = rng.integers(0, KINDS, len(user))
    kind = np.where(rng.random(len(user)) < share_liked, liked[user], other)
    item = rng.integers(0, ITEMS // KINDS, len(user)) * KINDS + kind
    chance = np.where(kind == liked[user], 0.7, 0.15)
    seconds = rng.integers(0, DAYS * 24 * 3600, len(user))
    return pl.DataFrame(
        {
            "user": user,
            "item": item,
            "at": [START + timedelta(seconds=int(s)) for s in seconds],
            "response": (rng.random(len(user)) < chance).astype(np.int64),
        }
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """As workers have: threads that wait for each other cost more than these small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def likes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set."""
    folder = tmp_path_factory.mktemp("likes")
    prepare(write_likes(folder / "raw"), folder / "likes", shards=3)
    return folder / "likes"


@pytest.fixture(scope="session")
def other_likes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other data of the same form."""
    folder = tmp_path_factory.mktemp("other")
    prepare(write_likes(folder / "raw", seed=1), folder / "likes", shards=3)
    return folder / "likes"


@pytest.fixture
def dataset(likes: Path) -> Dataset:
    return Dataset.open(likes)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for all tests: to make its tables takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def settings(likes: Path, database: str, tmp_path: Path) -> TrainSettings:
    """A training of seconds, in this process."""
    return TrainSettings(
        data=str(likes),
        model=SMALL_MODEL,
        optimiser=SMALL_OPTIMISER,
        workers=0,
        checkpoint_every=3,
        storage=str(tmp_path / "runs"),
        tracking_uri=database,
    )


@pytest.fixture(scope="session")
def feed_without_counters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose schema declares no counters."""
    folder = tmp_path_factory.mktemp("plain")
    schema = replace(write_likes(folder / "raw"), counters=())
    prepare(schema, folder / "likes", shards=2)
    return folder / "likes"
