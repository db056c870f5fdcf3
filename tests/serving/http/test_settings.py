"""Settings of a server: what is refused, and where the token comes from."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from hashtab.serving.http import (
    ServerSettings,
    SettingsError,
    add_server_arguments,
    run,
    server_settings,
)


def parsed(*arguments: str) -> ServerSettings:
    parser = argparse.ArgumentParser()
    add_server_arguments(parser)
    return server_settings(parser.parse_args(arguments))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "scorer.internal", ""])
def test_a_reachable_host_needs_a_token(host: str) -> None:
    with pytest.raises(SettingsError, match="token"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, token="secret").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_host_needs_none(host: str) -> None:
    assert ServerSettings(host=host).token is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"port": 65536},
        {"processes": 0},
        {"max_body_bytes": 0},
        {"max_waiting": 0},
        {"deadline_ms": 0.0},
        {"deadline_ms": float("nan")},
        {"drain_s": float("inf")},
        {"token": ""},
        {"token": "two words"},
        {"token": "line\n"},
    ],
)
def test_a_setting_that_cannot_be_used_is_named(wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(SettingsError, match=name):
        ServerSettings(**wrong)


def test_the_token_is_not_shown() -> None:
    assert "secret" not in repr(ServerSettings(token="secret"))


def test_options_default_to_the_settings_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASHTAB_TOKEN", raising=False)
    assert parsed() == ServerSettings()


def test_every_option_reaches_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret\n")
    options = "--host ::1 --port 1 --processes 2 --max-body-bytes 3 --max-waiting 4"
    more = f"--deadline-ms 5.5 --drain-s 6 --token-file {file}"
    assert parsed(*options.split(), *more.split()) == ServerSettings(
        host="::1",
        port=1,
        processes=2,
        max_body_bytes=3,
        max_waiting=4,
        deadline_ms=5.5,
        drain_s=6.0,
        token="secret",
    )


def test_the_token_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASHTAB_TOKEN", "secret")
    assert parsed("--host", "0.0.0.0").token == "secret"


@pytest.mark.parametrize("content", [None, b"", b"  \n", b"\xff"])
def test_a_token_file_without_a_token_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=str(file)):
        parsed("--token-file", str(file))


def test_a_function_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingsError, match="nowhere:create"):
        run("nowhere:create", ServerSettings(port=0))
