"""What a request may hold, and what it is told when it may not."""

import json

import pytest

from hashtab.serving.http import ServerSettings, build_app
from tests.serving.http.client import Client
from tests.serving.http.services import Example

JSON = {"Content-Type": "application/json"}


def test_a_body_comes_as_the_type_that_the_endpoint_takes(client: Client) -> None:
    response = client.post("/count", {"user": "a", "items": [1, 2, 3]})
    assert (response.status, response.json) == (200, {"count": 3})
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"user": 1, "items": [1, "2"]}', "items[1]"),
        (b'{"user": 1, "items": [1, false]}', "items[1]"),
        (b'{"user": 1, "items": [1, -1]}', "items[1]"),
        (b'{"user": 1, "items": [9223372036854775808]}', "items[0]"),
        (b'{"user": 1, "items": [' + b"9" * 5000 + b"]}", "items[0]"),
        (b'{"user": 1, "items": [1e999]}', "items[0]"),
        (b'{"user": null, "items": []}', "user"),
        (b'{"items": []}', "user"),
        (b'{"user": 1}', "items"),
        (b'{"user": 1, "items": [], "context": {"a": 1e999}}', "context[...]"),
        (b"[]", None),
        (b'"\\u0000"', None),
    ],
)
def test_a_wrong_value_is_named(client: Client, body: bytes, field: str | None) -> None:
    response = client.request("POST", "/count", body, JSON)
    assert response.status == 422
    assert response.json.get("field") == field
    assert response.json["error"].startswith(f"{field or 'the body'}: ")
    assert response.json["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty"),
        (b'{"user": 1, "items": [1,', "truncated"),
        (b'{"user": NaN, "items": []}', "not JSON"),
        (b'{"user": 1, "items": [Infinity]}', "not JSON"),
        (b'{"user": "\xff\xfe", "items": []}', "UTF-8"),
        (b'{"user": "\\ud800", "items": []}', "not JSON"),
        (b'{"user": 1, "items": []} x', "trailing"),
        (
            b'{"user": 1, "items": [], "context": {"a":' + b"[" * 4000 + b"]" * 4000 + b"}}",
            "too deeply",
        ),
        (b'{"user": 1, "items": [], "other": ' + b"[" * 4000 + b"]" * 4000 + b"}", "too deeply"),
    ],
)
def test_what_is_not_json_is_400(client: Client, body: bytes, reason: str) -> None:
    response = client.request("POST", "/count", body, JSON)
    assert response.status == 400
    assert reason in response.json["error"]


def test_of_a_key_given_twice_the_last_counts(client: Client) -> None:
    response = client.request("POST", "/count", b'{"user":1,"items":[],"items":[1]}', JSON)
    assert (response.status, response.json) == (200, {"count": 1})


@pytest.mark.parametrize("said", ["application/json; charset=utf-8", "Application/JSON", None])
def test_json_may_be_called_so_or_nothing(client: Client, said: str | None) -> None:
    headers = {} if said is None else {"Content-Type": said}
    body = b'{"user": 1, "items": []}'
    assert client.request("POST", "/count", body, headers).status == 200


def test_another_content_type_is_415(client: Client) -> None:
    headers = {"Content-Type": "text/plain"}
    response = client.request("POST", "/count", b'{"user": 1, "items": []}', headers)
    assert (response.status, response.json["field"]) == (415, "Content-Type")


@pytest.mark.parametrize("pieces", [b"x" * 10_001, [b"x" * 6_000, b"x" * 4_001]])
def test_a_body_too_large_is_413(client: Client, pieces: bytes | list[bytes]) -> None:
    response = client.request("POST", "/echo", pieces)
    assert response.status == 413
    assert "10000 bytes" in response.json["error"]


@pytest.mark.parametrize("pieces", [b"x" * 10_000, [b"x" * 6_000, b"x" * 4_000]])
def test_a_body_of_the_largest_size_is_read(client: Client, pieces: bytes | list[bytes]) -> None:
    response = client.request("POST", "/echo", pieces)
    assert (response.status, response.body) == (200, b"x" * 10_000)
    assert response.headers["content-type"] == "application/octet-stream"


def test_a_length_that_lies_is_not_believed(client: Client) -> None:
    response = client.request("POST", "/echo", b"x" * 10_001, {"Content-Length": "5"})
    assert response.status == 413


@pytest.mark.parametrize("length", ["9" * 30, "99999999999"])
def test_a_length_too_large_is_413_before_the_body(client: Client, length: str) -> None:
    assert client.request("POST", "/echo", b"", {"Content-Length": length}).status == 413


def test_an_unknown_path_is_404_in_json(client: Client) -> None:
    response = client.get("/v9/nothing")
    assert response.status == 404
    assert "/v9/nothing" in response.json["error"]


def test_another_method_is_405_and_names_those_that_work(client: Client) -> None:
    response = client.get("/count")
    assert (response.status, response.headers["allow"]) == (405, "POST")
    response = client.request("PUT", "/users/1")
    assert (response.status, response.headers["allow"]) == (405, "DELETE, GET")


def test_paths_queries_and_headers_come_decoded(client: Client) -> None:
    response = client.get("/users/a%2Fb%C3%A9?x=1&x=2&y=&z=%20", **{"X-Said": "this"})
    assert response.json == {
        "user": "a/bé",
        "query": {"x": "2", "y": "", "z": " "},
        "said": "this",
    }


def test_a_path_that_is_not_utf_8_is_400(client: Client) -> None:
    response = client.get("/users/%FF")
    assert (response.status, response.json["field"]) == (400, "user")


@pytest.mark.parametrize(
    "sent", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}]
)
def test_a_protected_endpoint_needs_the_token(client: Client, sent: dict[str, str]) -> None:
    response = client.request("DELETE", "/users/1", headers=sent)
    assert response.status == 401
    assert response.headers["www-authenticate"].startswith("Bearer")


def test_the_token_opens_protected_endpoints(client: Client) -> None:
    headers = {"Authorization": "bearer secret"}
    assert client.request("DELETE", "/users/1", headers=headers).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, 200),
        ({"Host": "127.0.0.1:8000", "Origin": "https://evil.example"}, 403),
        ({"Host": "127.0.0.1:8000", "Origin": "null"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "[127"}, 403),
    ],
)
def test_without_a_token_web_pages_of_elsewhere_cannot_use_protected_endpoints(
    headers: dict[str, str], status: int
) -> None:
    with Client(build_app(Example(), ServerSettings())) as client:
        answer = client.request("DELETE", "/users/17", headers=headers)
        assert answer.status == status
        if status == 403:
            assert answer.json["field"] in ("Host", "Origin")


def test_an_error_of_a_handler_is_told(client: Client) -> None:
    response = client.get("/users/1", **{"X-Said": "conflict", "X-Request-Id": "r1"})
    assert response.status == 409
    assert response.json == {"error": "twice", "field": "user", "request_id": "r1"}


@pytest.mark.parametrize("body", [b"", b"unencodable"])
def test_a_failure_is_500_without_its_reason(
    client: Client, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    response = client.request("POST", "/fail", body, {"X-Request-Id": "r1"})
    assert response.status == 500
    assert "secret" not in response.body.decode()
    assert response.json["request_id"] == "r1"
    [record] = caplog.records
    assert record.exc_info
    assert record.fields["request_id"] == "r1"  # type: ignore[attr-defined]


def test_ids_of_the_client_come_back(client: Client) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    response = client.get("/health/live", **{"X-Request-Id": "mine", "traceparent": parent})
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["traceparent"] == parent


@pytest.mark.parametrize("bad", ["", "two words", "x" * 129, "é"])
def test_ids_unfit_for_a_header_are_replaced(client: Client, bad: str) -> None:
    given = {"X-Request-Id": bad, "traceparent": bad}
    responses = [client.get("/health/live", **given) for _ in range(2)]
    first, second = (response.headers["x-request-id"] for response in responses)
    assert first != second
    assert bad != first
    assert "traceparent" not in responses[0].headers


@pytest.mark.parametrize("bad", ["soon", "0", "0.9", "-1", "nan", ""])
def test_a_timeout_that_is_no_number_from_1_on_is_422(client: Client, bad: str) -> None:
    response = client.request("POST", "/work", b"0", {"Request-Timeout-Ms": bad})
    assert (response.status, response.json["field"]) == (422, "Request-Timeout-Ms")


def test_every_error_is_json(client: Client) -> None:
    responses = [client.get("/nothing"), client.get("/count"), client.get("/users/%FF")]
    for response in responses:
        assert response.headers["content-type"] == "application/json"
        assert json.loads(response.body)["error"]
