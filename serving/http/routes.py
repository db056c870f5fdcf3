"""Finds the endpoint of a request."""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote

import msgspec
from prometheus_client import Counter
from starlette.routing import compile_path
from starlette.types import Scope

from hashtab.serving.http import metrics
from hashtab.serving.http.errors import HttpError
from hashtab.serving.http.service import Endpoint

_NO_PARAMETERS: Mapping[str, str] = {}


class Route:
    """An endpoint with all that is made once for it.

    Args:
        endpoint: of a service, or a common one.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.reads_json = endpoint.body is not None and endpoint.body is not bytes
        self.decoder: msgspec.json.Decoder[Any] | None = (
            msgspec.json.Decoder(endpoint.body) if self.reads_json else None
        )
        self.measures = Measures(f"{endpoint.method} {endpoint.path}")


class Measures:
    """The metrics of one endpoint.

    Args:
        name: of the endpoint.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._seconds = metrics.SECONDS.labels(name)
        self._requests: dict[int, Counter] = {}

    def count(self, status: int, answers: int = 1) -> None:
        """Count answers."""
        counter = self._requests.get(status)
        if counter is None:
            counter = self._requests[status] = metrics.REQUESTS.labels(self._name, str(status))
        counter.inc(answers)

    def observe(self, seconds: float) -> None:
        """Note how long an answer took."""
        self._seconds.observe(seconds)


class Routes:
    """All endpoints of a server.

    Args:
        routes: no two of one method and path.

    Raises:
        ValueError: if two are.
    """

    def __init__(self, routes: Iterable[Route]) -> None:
        self._exact: dict[str, dict[str, Route]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[str, Route]]] = []
        by_path: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods = by_path.setdefault(route.endpoint.path, {})
            if route.endpoint.method in methods:
                raise ValueError(f"two endpoints for {route.endpoint.method} {route.endpoint.path}")
            methods[route.endpoint.method] = route
        for path, methods in by_path.items():
            pattern, _, parameters = compile_path(path)
            if parameters:
                self._patterns.append((pattern, methods))
            else:
                self._exact[path] = methods

    def find(self, scope: Scope) -> tuple[Route, Mapping[str, str]]:
        """Return the route of a request and the values in its path.

        Raises:
            HttpError: 404 or 405 if there is none; 400 if a value is not UTF-8.
        """
        methods = self._exact.get(scope["path"])
        if methods is None:
            methods, values = self._match(scope)
        else:
            values = _NO_PARAMETERS
        route = methods.get(scope["method"])
        if route is None:
            allowed = ", ".join(sorted(methods))
            raise HttpError(405, f"{scope['path']} takes {allowed}", headers={"Allow": allowed})
        return route, values

    def _match(self, scope: Scope) -> tuple[dict[str, Route], Mapping[str, str]]:
        # The undecoded path: a value may hold a slash as %2F.
        raw = scope.get("raw_path") or quote(scope["path"]).encode("ascii")
        text = raw.decode("latin-1")
        for pattern, methods in self._patterns:
            if found := pattern.match(text):
                return methods, {n: _decode(n, v) for n, v in found.groupdict().items()}
        raise HttpError(404, f"there is nothing at {scope['path']}; /openapi.json lists what is")


def _decode(name: str, value: str) -> str:
    try:
        return unquote(value, errors="strict")
    except UnicodeDecodeError:
        raise HttpError(400, f"{name} in the path is not UTF-8", name) from None
