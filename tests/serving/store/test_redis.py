"""What only the Redis store meets: servers that are away, locked, full or not alone."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from hashtab.serving.store import StoreError, open_store
from tests.serving.store.records import FINGERPRINT
from tests.serving.store.servers import redis_server


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    options = "--requirepass", "secret", "--maxmemory", "3mb"
    with redis_server(tmp_path_factory.mktemp("locked"), *options) as socket:
        yield socket


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://:secret@localhost:1/2", "redis at localhost:1, database 2 does not answer"),
        ("unix:///nowhere/socket", "redis at /nowhere/socket, database 0 does not answer"),
        ("redis://:sec:ret@host:port/0", "redis:// URL of a store cannot be read; write redis://"),
    ],
)
def test_a_server_that_is_away_is_named_without_password(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as error:
        open_store(url)
    assert "sec" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("password", ["", ":wrong@", "stranger:wrong@"])
def test_a_wrong_password_says_where_it_goes(password: str, locked: Path) -> None:
    with pytest.raises(StoreError, match=r"refuses this user or password: write redis://user:pass"):
        open_store(f"unix://{password}{locked}")


def test_a_full_server_writes_nothing_and_says_so(locked: Path) -> None:
    with open_store(f"unix://:secret@{locked}") as store:
        written = 0

        def fill() -> None:
            nonlocal written
            for user in range(1, 100):
                store.put(FINGERPRINT, {0: b"%d" % user, user: bytes(100_000)})
                written = user

        with pytest.raises(StoreError, match="has no memory left: raise its maxmemory, or drop"):
            fill()
        assert store.get(FINGERPRINT, [0, written + 1]) == [b"%d" % written, None]
        assert store.drop(FINGERPRINT) == written + 1


def test_what_a_servers_settings_may_lose_is_said(tmp_path: Path) -> None:
    with (
        redis_server(
            tmp_path, "--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru"
        ) as socket,
        redis.Redis(unix_socket_path=str(socket)) as client,
        open_store(f"unix://{socket}") as store,
    ):
        disk, memory = store.losses()
        assert "--appendonly yes" in disk
        assert "noeviction" in memory
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "yes")
        (late,) = store.losses()
        assert "appendfsync to always" in late
        client.config_set("appendfsync", "always")
        assert store.losses() == []
        client.config_set("appendfsync", "everysec")
        client.acl_setuser("default", enabled=True, commands=["-config"])
        assert store.losses() == []  # of a hosted server, which does not tell


def test_a_replica_is_read_but_not_written(empty_server: Path, tmp_path: Path) -> None:
    with redis_server(tmp_path) as replica, redis.Redis(unix_socket_path=str(replica)) as client:
        with open_store(f"unix://{replica}") as store:
            store.put(FINGERPRINT, {1: b"a"})
            client.execute_command("REPLICAOF", "127.0.0.1", "1")
            with pytest.raises(StoreError, match="is a read-only replica: name its primary"):
                store.put(FINGERPRINT, {1: b"b"})
        with open_store(f"unix://{replica}", readonly=True) as store:
            assert store.get(FINGERPRINT, [1]) == [b"a"]


def test_other_programs_keys_are_neither_counted_nor_dropped(empty_server: Path) -> None:
    with (
        redis.Redis(unix_socket_path=str(empty_server)) as client,
        open_store(f"unix://{empty_server}") as store,
    ):
        client.set(FINGERPRINT + b"i12345678", b"theirs")
        client.lpush("hashtab", "theirs")
        store.put(FINGERPRINT, {1: b"a"})
        assert store.counts() == {FINGERPRINT: 1}
        assert store.drop(FINGERPRINT) == 1
        assert client.get(FINGERPRINT + b"i12345678") == b"theirs"


def test_a_missing_client_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['redis'] = None\n"
        "from hashtab.serving.store import StoreError, open_store\n"
        "try:\n    open_store('redis://localhost')\n"
        "except StoreError as error:\n    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "pip install 'hashtab[redis]'" in result.stdout
