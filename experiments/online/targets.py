"""The endpoints that bad requests are sent to, and where and how to be wrong there."""

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np

from experiments.online.bad_requests import (
    HTTP_MAKERS,
    JSON_MAKERS,
    MISPLACED,
    OK,
    WRONG,
    Bad,
    Target,
)
from experiments.online.bad_tensors import BREAKERS, good
from experiments.online.client import request
from experiments.online.inputs import Events, score_body
from hashtab.serving.bundle import Bundle
from hashtab.serving.store import User

_NOT_ONE = ["true", "false", "[]", "{}", "[1]"]
_COUNTS = ["0", "-1", "1.5", '"3"', "true", "[]", "-9223372036854775808"]
_TIMES = ["1.5", "true", "[]", "{}", '"soon"', '"2024-13-01T00:00:00"', '"2024-02-30T00:00:00Z"']


TOKEN = "a-token-of-the-fuzz"
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}


def scorer_targets(bundle: Bundle, user: User) -> list[Target]:
    """Return the scorer's endpoints that take JSON."""
    body = score_body(bundle, user, 5, np.random.default_rng(0))
    common = {key: body[key] for key in body if key != "items"}
    wrong = {"user": _NOT_ONE, "context": ["null", "5", "[]", '"x"', '{"a": {}}']}
    for name in body["context"]:
        wrong[f"context.{name}"] = ["{}", "[[1]]", '[{"a": 1}]']
    if "time" in body:
        wrong["time"] = [*_TIMES, "99999999999999999999"]
    lists = ["null", "5", '"abc"', "{}", "true", "[[1]]", "[true]", "[{}]"]
    score = wrong | {"items": lists, "top": _COUNTS}
    listed = {f"context.{name}": [*wrong[f"context.{name}"], "[]"] for name in body["context"]}
    counts = {"count": _COUNTS, "candidates": [*_COUNTS, "1000000"], "allow": lists[1:]}
    item = {"item": [*_NOT_ONE]}
    retrieval = {"count": 5, "candidates": 50, "exclude_seen": True, "allow": body["items"]}
    shared: dict[str, Any] = {"strict": True, "headers": WITH_TOKEN}
    return [
        Target(
            path="/v1/score",
            body=body | {"top": 3},
            wrong=score | listed,
            required=["user", "items"],
            list_at=("items", 5000),
            **shared,
        ),
        Target(
            path="/v1/recommend",
            body=common | retrieval,
            wrong=wrong | counts | {"exclude_seen": ["null", "1", '"true"', "[]"]},
            required=["user"],
            list_at=None,
            **shared,
        ),
        Target(
            path="/v1/explain",
            body=common | {"item": body["items"][0]},
            wrong=wrong | item,
            required=["user", "item"],
            list_at=None,
            **shared,
        ),
    ]


def bse_targets(bundle: Bundle, user: User) -> list[Target]:
    """Return the BSE service's endpoints that take JSON."""
    event = Events(bundle, "fuzz").make(user, 1_700_000_000_000_000)
    other_kind = "5" if bundle.manifest.text_users else '"abc"'
    names = ["null", "1.5", '""', f'"{"x" * 121}"', str(2**63), str(-(2**70)), *_NOT_ONE]
    wrong = {
        "events": ["null", "5", "[]", "{}", "[5]", "[null]", "[[]]", '"x"'],
        "events.0": ["null", "5", "[]", '"x"', "true"],
        "events.0.id": ["null", "5", '""', f'"{"x" * 201}"', *_NOT_ONE],
        "events.0.user": [*names, other_kind],
        "events.0.item": names,
        "events.0.time": [*_TIMES, str(2**60), "null", '"9999-01-01T00:00:00Z"', str(2**53)],
        "events.0.side": ["null", "5", '"x"', '{"a": []}', '{"a": {}}', '{"a": true}'],
    }
    required = ["events", *(f"events.0.{name}" for name in ("id", "user", "item", "time"))]
    models = {"bundle": ["null", "5", '""', "[]", "{}", "true"]}
    shared: dict[str, Any] = {"strict": True, "headers": WITH_TOKEN}
    return [
        Target(
            path="/v1/events",
            body={"events": [event]},
            wrong=wrong,
            required=required,
            list_at=("events", 10_000),
            **shared,
        ),
        Target(
            path="/v1/models",
            body={"bundle": str(bundle.folder)},
            wrong=models,
            required=["bundle"],
            list_at=None,
            **shared,
        ),
    ]


def no_token(target: Target, random: Random) -> Bad:
    """A protected endpoint without its token, or with another."""
    said = random.choice(["", "Bearer", "Bearer x", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"])
    data = target.post(target.text(), Authorization=said)
    return Bad(kind="no token", data=data, statuses=frozenset({401}), names="Authorization")


def odd_user(random: Random) -> Bad:
    """A user in a path that nobody has, or that can be none."""
    name = random.choice(
        ["%00", "%ff", "..%2f..", "9" * 30, "-1", "1.5", "x" * 600, "%F0%9F%98%80", "%20", "NaN"]
    )
    method = random.choice(["GET", "DELETE"])
    data = request(method, f"/v1/users/{name}", headers=WITH_TOKEN)
    return Bad(kind="odd user", data=data, statuses=OK | MISPLACED | WRONG)


def odd_bundle(path: str, random: Random) -> Bad:
    """A bundle that is none, in a request to load or keep it."""
    places = ["/etc/passwd", "../../etc", "/proc/self/mem", "/nowhere", "a\\u0000b", "/dev/zero"]
    raw = f'{{"bundle": "{random.choice([*places, "x" * 5000])}"}}'.encode()
    data = request("POST", path, raw, {"Content-Type": "application/json", **WITH_TOKEN})
    return Bad(kind="odd bundle", data=data, statuses=frozenset({400, 409, 422}), names="bundle")


def against_scorer(bundle: Bundle, user: User, seed: int, count: int) -> Iterator[Bad]:
    """Yield so many bad requests to a scorer."""
    random, targets = Random(seed), scorer_targets(bundle, user)
    items = np.random.default_rng(seed)
    for _ in range(count):
        target = random.choice(targets)
        match random.choices(["json", "tensor", "http", "bundle", "user"], [56, 25, 15, 2, 2])[0]:
            case "json":
                yield random.choice(JSON_MAKERS)(target, random)
            case "tensor":
                message = good(bundle, user, random.randint(2, 20), items)
                yield random.choice(BREAKERS)(message, random)
            case "http":
                yield random.choice(HTTP_MAKERS)(target, random)
            case "bundle":
                yield odd_bundle("/v2/repository/models/hashtab/load", random)
            case "user":
                yield odd_user(random)


def against_bse(bundle: Bundle, user: User, seed: int, count: int) -> Iterator[Bad]:
    """Yield so many bad requests to a BSE service."""
    random, targets = Random(seed), bse_targets(bundle, user)
    for _ in range(count):
        target = random.choice(targets)
        match random.choices(["json", "http", "token", "user", "bundle"], [70, 15, 6, 6, 3])[0]:
            case "json":
                yield random.choice(JSON_MAKERS)(target, random)
            case "http":
                yield random.choice(HTTP_MAKERS)(target, random)
            case "token":
                yield no_token(target, random)
            case "user":
                yield odd_user(random)
            case "bundle":
                yield odd_bundle("/v1/models", random)
