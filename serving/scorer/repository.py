"""Which models there are and which one is served: Triton's repository, and a view of one's own."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hashtab.serving.errors import BundleError
from hashtab.serving.http import Call, Endpoint, HttpError, Reply
from hashtab.serving.scorer.champion import ModelName
from hashtab.serving.scorer.coverage import CoverageError
from hashtab.serving.scorer.desired import Desired
from hashtab.serving.scorer.swapping import Waiting

if TYPE_CHECKING:
    from hashtab.serving.scorer.service import ScorerService


_PATH = re.compile(r"[^\0\ud800-\udfff]+", re.DOTALL)  # which no file system has


class ModelsReply(msgspec.Struct):
    """What a process serves, and what keeps it from serving something else.

    Args:
        name: of the model.
        served: the model in use; null before the first.
        waiting: the bundle that should be served and cannot be yet; null if there is none.
        source: folder or alias that is followed.
        source_problem: why that cannot be followed now; null if it can.
        store_problem: why users' tables cannot be read now; null if they can.
    """

    name: str
    served: ModelName | None
    waiting: Waiting | None
    source: str
    source_problem: str | None
    store_problem: str | None


def endpoints(service: "ScorerService") -> list[Endpoint]:
    """Return the endpoints of models."""
    name = service.settings.name

    async def models(_: Call) -> Reply:
        return Reply(
            ModelsReply(
                name=name,
                served=service.served.model if service.served else None,
                waiting=service.swapper.waiting,
                source=service.settings.bundle,
                source_problem=service.state.followed().problem,
                store_problem=service.tables.problem,
            )
        )

    async def index(_: Call) -> Reply:
        rows: list[dict[str, str]] = []
        if service.served is not None:
            version = service.served.model.version
            rows.append({"name": name, "version": version, "state": "READY", "reason": ""})
        waiting = service.swapper.waiting
        if waiting is not None:
            rows.append(
                {
                    "name": name,
                    "version": waiting.version or "",
                    "state": "UNAVAILABLE",
                    "reason": waiting.reason,
                }
            )
        return Reply(rows)

    async def load(call: Call) -> Reply:
        _check_name(call, name)
        folder = _folder(call.body)
        desired = service.state.desired() if folder is None else Desired.of(folder)
        if desired is None:
            raise HttpError(409, "nothing is followed yet: name a bundle", "bundle")
        try:
            await service.swapper.bring(desired)
        except BundleError as error:
            raise HttpError(422, str(error), "bundle") from error
        except CoverageError as error:
            service.state.desire(desired)
            raise HttpError(409, f"{error}; it is tried again until then", "bundle") from error
        service.state.desire(desired)  # other processes of the server follow
        return Reply(service.current().model)

    async def unload(call: Call) -> Reply:
        _check_name(call, name)
        raise HttpError(
            409,
            f"{name!r} is the only model of this server and is not unloaded: load another bundle, "
            "or stop the server",
            "model",
        )

    return [
        Endpoint(
            method="GET",
            path="/v1/models",
            handle=models,
            replies=ModelsReply,
            summary="What is served, and what keeps another model from it.",
        ),
        *(
            Endpoint(
                method=method,
                path="/v2/repository/index",
                handle=index,
                body=bytes if method == "POST" else None,
                summary="The models of this server.",
            )
            for method in ("GET", "POST")
        ),
        Endpoint(
            method="POST",
            path="/v2/repository/models/{model}/load",
            handle=load,
            body=bytes,
            replies=ModelName,
            errors=(400, 404, 409, 422),
            summary="Serve another bundle, or try again what should be served.",
            protected=True,
        ),
        Endpoint(
            method="POST",
            path="/v2/repository/models/{model}/unload",
            handle=unload,
            body=bytes,
            errors=(404, 409),
            summary="Refused: a server has one model.",
            protected=True,
        ),
    ]


def _check_name(call: Call, name: str) -> None:
    if call.path["model"] != name:
        raise HttpError(
            404, f"there is no model {call.path['model'][:80]!r} here; it is {name!r}", "model"
        )


def _folder(body: bytes) -> Path | None:
    """Read `{"bundle": folder}`, or the same as the config that Triton's clients send."""
    if not body.strip():
        return None
    try:
        asked: Any = json.loads(body)
        config = asked.get("parameters", {}).get("config")
        named = (asked if config is None else json.loads(config)).get("bundle")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise HttpError(400, 'the body must be JSON as {"bundle": folder}', "body") from error
    if named is not None and not (isinstance(named, str) and _PATH.fullmatch(named)):
        raise HttpError(400, "bundle must be the path of a folder", "bundle")
    return None if named is None else Path(named)
