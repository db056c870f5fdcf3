"""Requests that schemathesis makes from a service's own description, right and wrong ones."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from experiments.online.bad_requests import Bad
from experiments.online.client import request

_OWN = frozenset({"user-agent", "accept", "accept-encoding", "connection", "content-length"})


def described(
    openapi: dict[str, Any], headers: dict[str, str], number: int, count: int
) -> Iterator[Bad]:
    """Yield about so many requests, evenly over all operations; any documented answer is right.

    Args:
        openapi: description of a service.
        headers: of every request.
        number: of the seed.
        count: of requests.
    """
    schema = schemathesis.openapi.from_dict(openapi)
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    modes = list(GenerationMode)
    each = max(1, count // (len(operations) * len(modes)))
    for operation in operations:
        documented = openapi["paths"][operation.path][operation.method]["responses"]
        statuses = frozenset(int(status) for status in documented if status != "500")
        for mode in modes:
            kind = f"schemathesis, {mode.value} {operation.label}"
            for case in _cases(operation, mode, number, each):
                data = _bytes(case, headers)
                # What cannot be a path parameter may be no path of this operation either.
                yield Bad(kind=kind, data=data, statuses=statuses | {404, 405}, broken=True)


def _cases(operation: Any, mode: GenerationMode, number: int, count: int) -> list[Any]:
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def collect(case: Any) -> None:
        found.append(case)

    with suppress(Unsatisfiable):  # an operation without parameters has no wrong ones
        collect()
    return found


def _bytes(case: Any, headers: dict[str, str]) -> bytes:
    arguments = case.as_transport_kwargs(base_url="http://localhost")
    known = {name: arguments.get(name) for name in ("method", "url", "params", "data", "json")}
    made = requests.Request(**known, headers=dict(arguments["headers"])).prepare()
    body = made.body.encode() if isinstance(made.body, str) else made.body
    kept = {name: str(value) for name, value in made.headers.items() if name.lower() not in _OWN}
    return request(str(made.method), made.path_url, body or b"", {**kept, **headers})
