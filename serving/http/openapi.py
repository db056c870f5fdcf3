"""Describes the endpoints of a server as OpenAPI 3.1."""

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from hashtab.serving.http.answers import ErrorBody
from hashtab.serving.http.deadlines import LEAST_MS, TIMEOUT_HEADER
from hashtab.serving.http.service import Endpoint
from hashtab.serving.http.settings import ServerSettings

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_REFERENCE = "#/components/schemas/{name}"
_BYTES: Mapping[str, Any] = {"*/*": {"schema": {}}}
_JSON: Mapping[str, Any] = {"application/json": {"schema": {}}}

Json = dict[str, Any]


def describe(name: str, endpoints: Sequence[Endpoint], settings: ServerSettings) -> bytes:
    """Return the description as JSON.

    Args:
        name: of the service.
        endpoints: all of the server.
        settings: of the server; protected endpoints are said to need a token where there is one.
    """
    kinds = [k for e in endpoints for k in (e.body, e.replies) if k not in (None, bytes)]
    schemas, components = msgspec.json.schema_components(
        [*kinds, ErrorBody], ref_template=_REFERENCE
    )
    schema_of = _Schemas(kinds, schemas)
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        operation = _operation(endpoint, schema_of, locked=settings.token is not None)
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    parts: Json = {"schemas": components}
    if settings.token is not None:
        parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    whole = {
        "openapi": "3.1.0",
        "info": {"title": name, "version": "1"},
        "paths": paths,
        "components": parts,
    }
    return msgspec.json.encode(whole)


class _Schemas:
    """Finds the schema of a type; types need not be hashable."""

    def __init__(self, kinds: Sequence[Any], schemas: Sequence[Json]) -> None:
        self._pairs = list(zip(kinds, schemas, strict=False))

    def content(self, kind: Any) -> Mapping[str, Any]:
        """Return the media types of a body of this type."""
        if kind is bytes:
            return _BYTES
        if kind is None:
            return _JSON
        schema = next(schema for known, schema in self._pairs if known is kind)
        return {"application/json": {"schema": schema}}


def _operation(endpoint: Endpoint, schemas: _Schemas, *, locked: bool) -> Json:
    operation: Json = {
        "summary": endpoint.summary,
        "parameters": _parameters(endpoint),
        "responses": _responses(endpoint, schemas),
    }
    if endpoint.body is not None:
        content = schemas.content(endpoint.body)
        operation["requestBody"] = {
            "required": endpoint.body is not bytes,
            "content": content,
        }
    if endpoint.protected and locked:
        operation["security"] = [{"token": []}]
    return operation


def _parameters(endpoint: Endpoint) -> list[Json]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(endpoint.path)
    ]
    timeout = {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "description": "Milliseconds that the client waits; after that the answer is 503.",
        "schema": {"type": "number", "minimum": LEAST_MS},
    }
    return [*in_path, timeout]


def _responses(endpoint: Endpoint, schemas: _Schemas) -> Json:
    error = {"schema": {"$ref": _REFERENCE.format(name=ErrorBody.__name__)}}
    described: Json = {
        "200": {"description": "The answer.", "content": schemas.content(endpoint.replies)}
    }
    for status in sorted(_statuses(endpoint)):
        described[str(status)] = {
            "description": f"{HTTPStatus(status).phrase}.",
            "content": {"application/json": error},
        }
    return described


def _statuses(endpoint: Endpoint) -> set[int]:
    """Return the statuses of the errors that an endpoint can answer with."""
    statuses = {400, 422, 500, 503, *endpoint.errors}
    if "{" in endpoint.path:
        statuses.add(404)
    if endpoint.body is not None:
        statuses |= {408, 413}
        if endpoint.body is not bytes:
            statuses.add(415)
    if endpoint.protected:
        statuses |= {401, 403}
    if endpoint.work:
        statuses.add(429)
    return statuses
