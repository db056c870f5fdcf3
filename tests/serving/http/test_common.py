"""What every service answers: health, metrics, and its description."""

import re

import pytest

from hashtab.serving.http import Endpoint, ServerSettings, build_app
from tests.serving.http.client import Client
from tests.serving.http.services import Example


def metric(client: Client, name: str) -> float:
    text = client.get("/metrics").body.decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_service_is_ready_when_it_says_so(client: Client, service: Example) -> None:
    assert client.get("/health/ready").json == {"ready": True}
    service.reason = "no model yet"
    response = client.get("/health/ready")
    assert (response.status, response.json["error"]) == (503, "no model yet")
    assert client.get("/health/live").status == 200
    assert client.get("/users/1").status == 200


def test_before_the_start_only_the_common_endpoints_answer(
    service: Example, settings: ServerSettings
) -> None:
    app = build_app(service, settings)
    with Client(app) as client:
        app.lifecycle.started = False
        response = client.get("/users/1")
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        response = client.get("/health/ready")
        assert (response.status, response.json["error"]) == (503, "starting")
        assert client.get("/health/live").status == 200


def test_while_draining_requests_are_answered_and_ready_says_no(
    service: Example, settings: ServerSettings
) -> None:
    app = build_app(service, settings)
    with Client(app) as client:
        app.lifecycle.draining = True
        response = client.get("/health/ready")
        assert (response.status, response.json["error"]) == (503, "draining")
        assert client.get("/users/1").status == 200


def test_the_lifespan_stops_the_service(service: Example, settings: ServerSettings) -> None:
    with Client(build_app(service, settings)):
        assert not service.stopped
    assert service.stopped


def test_requests_are_counted_by_endpoint_and_status(client: Client) -> None:
    name = 'hashtab_http_requests_total{endpoint="GET /users/{user}",status="200"}'
    nowhere = 'hashtab_http_requests_total{endpoint="none",status="404"}'
    before, lost = metric(client, name), metric(client, nowhere)
    client.get("/users/1")
    client.get("/users/2")
    client.get("/a/path/of/nobody")
    assert metric(client, name) == before + 2
    assert metric(client, nowhere) == lost + 1


def test_seconds_are_measured_of_what_was_not_refused(client: Client) -> None:
    name = 'hashtab_http_request_seconds_count{endpoint="POST /work"}'
    refused = 'hashtab_http_refused_total{reason="full"}'
    before, full = metric(client, name), metric(client, refused)
    client.together(*[("POST", "/work", b"1", {})] * 10)
    assert metric(client, name) == before + 4
    assert metric(client, refused) == full + 6


def test_a_request_in_flight_is_seen(client: Client) -> None:
    assert metric(client, "hashtab_http_requests_in_flight") == 1  # the one that asks


def test_two_endpoints_of_one_path_and_method_are_refused(settings: ServerSettings) -> None:
    class Twice(Example):
        def endpoints(self) -> list[Endpoint]:
            return [*super().endpoints()] * 2

    with pytest.raises(ValueError, match="POST /count"):
        build_app(Twice(), settings)


def test_the_description_names_what_can_be_answered(client: Client) -> None:
    described = client.get("/openapi.json").json
    assert described["openapi"].startswith("3.1")
    count = described["paths"]["/count"]["post"]
    assert count["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Shop"
    }
    assert {"200", "400", "408", "413", "415", "422", "429", "500", "503"} == set(
        count["responses"]
    )
    assert "security" not in count
    delete = described["paths"]["/users/{user}"]["delete"]
    assert {"401", "404", "409"} <= set(delete["responses"])
    assert delete["security"] == [{"token": []}]
    assert [p["name"] for p in delete["parameters"] if p["in"] == "path"] == ["user"]
    assert set(described["components"]["schemas"]) >= {"Shop", "Count", "Ready", "ErrorBody"}


def test_without_a_token_the_description_asks_for_none() -> None:
    with Client(build_app(Example(), ServerSettings())) as client:
        described = client.get("/openapi.json").json
        assert "security" not in described["paths"]["/users/{user}"]["delete"]
        assert client.request("DELETE", "/users/1").status == 200
