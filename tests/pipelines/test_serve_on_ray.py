"""The same scorer on a Ray cluster answers with the same scores."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from hashtab.pipelines import serve_on_ray
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.encode_users import EncodeSettings, encode
from hashtab.pipelines.serve_on_ray import RaySettings, deployed
from hashtab.serving.scorer.champion import Served
from hashtab.serving.store import open_store, unpack
from tests.pipelines.test_serve import free_port
from tests.serving.scorer.servers import wait_for

ITEMS, CONTEXT, TIME_US = [0, 7, 14, 21, 28], {"display": "d1"}, 1_675_000_000_000_000

# Ray Serve declares its settings in a form that pydantic has deprecated.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def store(shop_data: Path, shop_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of all users of the shop."""
    folder = tmp_path_factory.mktemp("tables") / "store"
    encode(
        EncodeSettings(bundle=str(shop_bundle), data=str(shop_data), store=str(folder), workers=0)
    )
    return folder


@pytest.fixture(scope="module")
def url(shop_bundle: Path, store: Path) -> Iterator[str]:
    """Where a deployed scorer answers."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    settings = RaySettings(bundle=str(shop_bundle), store=str(store), port=port, cores=0.1)
    server = replace(settings.server, deadline_ms=30_000)  # on a busy machine too
    with cluster(2, None), deployed(settings, server):
        wait_for(lambda: is_ready(address))
        yield address
    assert not ray.is_initialized()


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def is_ready(url: str) -> bool:
    """Tell whether the scorer has a model yet; Ray calls it deployed before."""
    try:
        return bool(ask(f"{url}/health/ready")["ready"])
    except urllib.error.HTTPError:
        return False


def test_scores_are_those_of_this_process(url: str, shop_bundle: Path, store: Path) -> None:
    served = Served.open(shop_bundle, None)
    with open_store(str(store), readonly=True) as opened:
        user, data = next(opened.items(served.layout.fingerprint))
    context = served.context.encode(CONTEXT, TIME_US, len(ITEMS)).columns
    record = unpack(data, served.layout)
    expected = served.score(record, served.items.rows(ITEMS), context)
    asked = {"user": user, "items": ITEMS, "context": CONTEXT, "time": TIME_US}
    answer = ask(f"{url}/v1/score", asked)
    assert answer["history"] == "table"
    assert answer["scores"] == expected.tolist()


def test_health_and_description_are_there(url: str) -> None:
    assert ask(f"{url}/health/ready")["ready"] is True
    assert "/v1/score" in ask(f"{url}/openapi.json")["paths"]


def test_a_public_host_needs_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HASHTAB_TOKEN", raising=False)
    assert serve_on_ray.main(["--bundle=bundle", "--host=0.0.0.0"]) == 2
    assert "there is no token" in capsys.readouterr().err


def test_a_bundle_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_on_ray.main([]) == 2
    assert "--bundle must name" in capsys.readouterr().err
