"""What keeps a scorer well for months: its tasks survive, its probes are true, its past is shut."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pytest

from hashtab.serving.http import ServerSettings, build_app
from hashtab.serving.scorer import service as service_module
from hashtab.serving.scorer.log import events_of
from hashtab.serving.scorer.service import ScorerService
from hashtab.serving.scorer.settings import ScorerSettings
from hashtab.serving.scorer.tables import Tables
from tests.serving.http.client import Client
from tests.serving.scorer.kept import Kept
from tests.serving.scorer.servers import scorer, wait_for

USER = 105
TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def client(kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A scorer in this process, with a token."""
    state = tmp_path_factory.mktemp("state")
    settings = ScorerSettings(bundle=str(kept.bundle), store=str(kept.store), state=state)
    with Client(build_app(ScorerService(settings), ServerSettings(token="secret"))) as client:
        for _ in range(1000):
            if client.get("/health/ready").status == 200:
                break
            client.wait(0.01)
        yield client


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", f"/v1/users/{USER}", None),
        ("POST", "/v1/explain", {"user": USER, "item": 7}),
        ("POST", "/v1/recommend", {"user": USER}),
        ("POST", "/v2/repository/models/hashtab/load", {}),
    ],
)
def test_what_shows_a_users_past_or_changes_the_model_needs_the_token(
    method: str, path: str, body: object, client: Client
) -> None:
    sent = b"" if body is None else json.dumps(body).encode()
    said = {"Content-Type": "application/json"} if sent else {}
    assert client.request(method, path, sent, said).status == 401
    assert client.request(method, path, sent, said | TOKEN).status == 200


def test_metrics_of_what_there_is_not_are_no_alarms(client: Client) -> None:
    lines = client.get("/metrics").body.decode().splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert found["hashtab_scorer_registry_up"] == "NaN"  # a folder is followed
    assert found["hashtab_scorer_store_up"] == "1.0"
    assert float(found["hashtab_scorer_table_staleness_seconds"]) >= 0  # of the last heartbeat


def test_no_probe_says_ready_while_the_server_drains(client: Client) -> None:
    assert client.get("/v2/health/ready").status == 200
    service_of(client).draining = True
    try:
        assert client.get("/v2/health/ready").status == 503
        assert client.get("/health/ready").status == 503
        assert client.get("/v2/health/live").status == 200
    finally:
        service_of(client).draining = False


def service_of(client: Client) -> ScorerService:
    service = client.app.lifecycle.service  # type: ignore[attr-defined]
    assert isinstance(service, ScorerService)
    return service


def test_a_path_that_no_file_system_has_is_refused_and_breaks_nothing(client: Client) -> None:
    path = "/v2/repository/models/hashtab/load"
    for named in ("\\ud800", "a\\u0000b", ""):
        answer = client.request("POST", path, b'{"bundle": "%s"}' % named.encode(), TOKEN)
        assert (answer.status, answer.json["field"]) == (400, "bundle")
        assert client.get("/v1/models").status == 200


def test_a_bundle_that_an_admin_names_in_vain_is_waited_for_by_nobody(
    client: Client, tmp_path: Path
) -> None:
    path, body = "/v2/repository/models/hashtab/load", json.dumps({"bundle": str(tmp_path)})
    assert client.request("POST", path, body.encode(), TOKEN).status == 422
    assert client.get("/v1/models").json["waiting"] is None
    assert len(client.get("/v2/repository/index").json) == 1


def test_lists_that_would_take_the_processor_for_long_are_refused(client: Client) -> None:
    body = json.dumps({"user": USER, "allow": [7] * 50_001}).encode()
    said = {"Content-Type": "application/json"} | TOKEN
    answer = client.request("POST", "/v1/recommend", body, said)
    assert (answer.status, answer.json["field"]) == (422, "allow")
    tensor = {"name": "unknown", "datatype": "INT64", "shape": [5001], "data": [7] * 5001}
    body = json.dumps({"inputs": [tensor]}).encode()
    answer = client.request("POST", "/v2/models/hashtab/infer", body, said)
    assert (answer.status, answer.json["field"]) == (422, "unknown")


def test_a_folder_that_cannot_be_read_at_times_is_followed_on(
    kept: Kept, shop_bundle: Path, tmp_path: Path
) -> None:
    folder = copytree(shop_bundle, tmp_path / "champion")
    good = (folder / "manifest.json").read_text()
    with scorer(tmp_path / "server", "--bundle", folder, "--store", kept.store) as server:
        for bad in ("[" * 100_000, '{"format": ' + "9" * 5000 + "}", "[]"):
            (folder / "manifest.json").write_text(bad)
            wait_for(lambda: "no manifest" in (server.models()["waiting"] or {}).get("reason", ""))
            (folder / "manifest.json").write_text(good)
            wait_for(lambda: server.models()["waiting"] is None)


def test_a_task_that_fails_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_AGAIN_S", 0.0)
    begun = 0

    async def work() -> None:
        nonlocal begun
        begun += 1
        if begun < 3:
            raise OSError("the disk is full")
        await asyncio.Event().wait()

    async def check() -> None:
        task = asyncio.create_task(service_module._go_on(work))
        while begun < 3:
            await asyncio.sleep(0.001)
        assert not task.done()
        task.cancel()

    asyncio.run(check())


def test_a_store_that_does_not_answer_is_not_asked_for_the_log(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = Tables(str(kept.store), 1.0)
    asyncio.run(tables.look(None))
    assert asyncio.run(events_of(tables, USER))
    tables.problem = "it does not answer"
    monkeypatch.setattr(Tables, "patient", lambda _: pytest.fail("it was asked"))
    assert asyncio.run(events_of(tables, USER)) is None
    tables.close()
