"""Both backends under one suite: an LMDB folder and a real Redis server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from hashtab.serving.store import TableStore, open_store
from tests.serving.store.servers import redis_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with redis_server(tmp_path_factory.mktemp("redis")) as socket:
        yield socket


@pytest.fixture
def empty_server(server: Path) -> Path:
    with redis.Redis(unix_socket_path=str(server)) as client:
        client.flushall()
    return server


@pytest.fixture(params=["lmdb", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that does not exist yet."""
    if request.param == "lmdb":
        return f"lmdb:{tmp_path / 'store'}"
    return f"unix://{request.getfixturevalue('empty_server')}"


@pytest.fixture
def store(url: str) -> Iterator[TableStore]:
    with open_store(url) as opened:
        yield opened
