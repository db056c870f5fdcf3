"""The example service, served in this process."""

from collections.abc import Iterator

import pytest

from hashtab.serving.http import ServerSettings, build_app
from tests.serving.http.client import Client
from tests.serving.http.services import Example


@pytest.fixture
def service() -> Example:
    return Example()


@pytest.fixture
def settings() -> ServerSettings:
    return ServerSettings(token="secret", max_body_bytes=10_000, max_waiting=3)


@pytest.fixture
def client(service: Example, settings: ServerSettings) -> Iterator[Client]:
    with Client(build_app(service, settings)) as client:
        yield client
