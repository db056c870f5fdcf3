"""Prepared synthetic data, made once for all tests that only read it."""

from pathlib import Path

import pytest

from hashtab.features.schema import Schema
from tests.features import logs, prepared


@pytest.fixture(scope="session")
def shop_schema(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    return logs.shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def shop(shop_schema: Schema, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared.build(shop_schema, tmp_path_factory.mktemp("prepared") / "shop")


@pytest.fixture(scope="session")
def feed_schema(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    return logs.feed(tmp_path_factory.mktemp("feed"))


@pytest.fixture(scope="session")
def feed(feed_schema: Schema, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared.build(feed_schema, tmp_path_factory.mktemp("prepared") / "feed")
