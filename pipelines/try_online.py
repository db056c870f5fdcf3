"""Commands that show what the online services do, with a user and items of the model at hand."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hashtab.features.encoders import Encoder, Vocabulary
from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import BundleError
from hashtab.serving.store import User, open_store

_ITEMS = 3


@dataclass(frozen=True, kw_only=True)
class Example:
    """What commands ask for.

    Args:
        user: with a table.
        items: that the model knows.
        context: of the request.
        side: side features of a behaviour.
        time: whether the model reads the request's time.
        table: whether the model keeps a table, which recommendations come from.
    """

    user: User
    items: list[int | str]
    context: dict[str, Any]
    side: dict[str, Any]
    time: bool
    table: bool


def example(bundle_folder: Path, store: str) -> Example:
    """Return a user of the store, with items and context that the model knows.

    Raises:
        BundleError, StoreError: if one of them cannot be used, or the store has no table.
    """
    bundle = Bundle.open(bundle_folder)
    with open_store(store, readonly=True) as opened:
        user = next(iter(opened.users(bundle.layout.fingerprint)), None)
    if user is None:
        raise BundleError(f"{store} holds no table of {bundle_folder}: its event log is empty")
    manifest, encoders = bundle.manifest, bundle.encoders
    context = [f.name for f in manifest.features.context if f.name not in manifest.time_features]
    return Example(
        user=user,
        items=bundle.catalogue.items.head(_ITEMS).to_list(),
        context=_known(encoders, context),
        side=_known(encoders, manifest.side),
        time=bool(manifest.time_features),
        table=bool(manifest.table.groups),
    )


def _known(encoders: Mapping[str, Encoder], names: Any) -> dict[str, Any]:
    found = {name: encoders[name] for name in names}
    return {
        name: encoder.values[0] if isinstance(encoder, Vocabulary) else encoder.mean
        for name, encoder in found.items()
    }


def what_to_try(example: Example, scorer: str, bse: str) -> str:
    """Return commands for a shell, each with what it shows.

    Args:
        example: what they ask for.
        scorer: URL of the scorer.
        bse: URL of the BSE service.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    asked = {"user": example.user, "context": example.context}
    if example.time:
        asked["time"] = now
    to_score = {**asked, "items": example.items}
    event = {
        "id": f"try-{now}",
        "user": example.user,
        "item": example.items[0],
        "time": now,
        "side": example.side,
    }
    user = shlex.quote(f"{bse}/v1/users/{quote(str(example.user), safe='')}")
    item = {**asked, "item": example.items[0]}
    retrieved = [("recommend items", _post(scorer, "/v1/recommend", asked | {"count": 5}))]
    parts = [
        ("score items for a user", _post(scorer, "/v1/score", to_score)),
        *(retrieved if example.table else []),
        ("say what a score rests on", _post(scorer, "/v1/explain", item)),
        ("tell what the user just did", _post(bse, "/v1/events", {"events": [event]})),
        ("and see it in the first item's score", _post(scorer, "/v1/score", to_score)),
        ("show what is kept of the user", f"curl -sS {user}"),
        ("ask whether it is ready", f"curl -sS {scorer}/health/ready"),
        ("read the metrics", f"curl -sS {scorer}/metrics"),
    ]
    lines = [f"  {what}:\n    {command}" for what, command in parts]
    return "\n".join(
        [
            f"scorer at {scorer}, BSE service at {bse}; a page to look around: {scorer}/",
            "",
            "try, in another terminal:",
            *lines,
            "",
            "Ctrl-C ends both",
        ]
    )


def _post(url: str, path: str, body: Mapping[str, Any]) -> str:
    text = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl -sS {url}{path} -H 'Content-Type: application/json' -d {text}"
