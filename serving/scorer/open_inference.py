"""The Open Inference Protocol, version 2, with Triton's binary tensors, statistics and repository.

Inputs are USER `[1]`, ITEMS `[C]`, each context feature by its name, `[1]` or `[C]`, and TIME
`[1]` where the model reads it; the output is SCORES `[C]`.
"""

import time
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec

from hashtab.features.encoders import Vocabulary
from hashtab.serving.http import Call, Endpoint, HttpError, Reply
from hashtab.serving.scorer.champion import Served
from hashtab.serving.scorer.context import ContextError
from hashtab.serving.scorer.score import microseconds, score_items
from hashtab.serving.scorer.tensors import (
    BYTES,
    HEADER_LENGTH,
    InferRequest,
    answer,
    parse,
    wrong,
)
from hashtab.serving.scorer.values import Value

if TYPE_CHECKING:
    from hashtab.serving.scorer.service import ScorerService

USER, ITEMS, TIME, SCORES = "USER", "ITEMS", "TIME", "SCORES"
_RESERVED = USER, ITEMS, TIME
_EXTENSIONS = ["binary_tensor_data", "statistics", "model_repository"]


class Statistics:
    """What this process has inferred by this protocol, in the form of Triton's statistics."""

    def __init__(self) -> None:
        self.succeeded = self.failed = 0
        self.succeeded_ns = self.failed_ns = 0
        self.last_ms = 0

    def add(self, begun_ns: int, succeeded: bool) -> None:
        """Count one inference that ends now."""
        took = time.perf_counter_ns() - begun_ns
        self.last_ms = time.time_ns() // 1_000_000
        if succeeded:
            self.succeeded += 1
            self.succeeded_ns += took
        else:
            self.failed += 1
            self.failed_ns += took

    def plain(self, name: str, served: Served) -> dict[str, Any]:
        """Return the statistics as JSON has them."""
        success = {"count": self.succeeded, "ns": self.succeeded_ns}
        nothing = {"count": self.succeeded, "ns": 0}
        return {
            "name": name,
            "version": served.model.version,
            "last_inference": self.last_ms,
            "inference_count": self.succeeded,
            "execution_count": self.succeeded,
            "inference_stats": {
                "success": success,
                "fail": {"count": self.failed, "ns": self.failed_ns},
                "queue": nothing,
                "compute_input": nothing,
                "compute_infer": success,
                "compute_output": nothing,
            },
            "batch_stats": [],
        }


def endpoints(service: "ScorerService") -> list[Endpoint]:
    """Return the endpoints of the protocol but those of the repository."""
    found = _Protocol(service)
    gets = {
        "/v2": (found.server, "What the server is."),
        "/v2/health/live": (found.live, "Whether the server lives."),
        "/v2/health/ready": (found.ready, "Whether the model can be asked."),
        "/v2/models/stats": (found.stats, "Statistics of the model."),
    }
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        gets |= {
            model: (found.metadata, "Inputs and outputs of the model."),
            f"{model}/ready": (found.model_ready, "Whether the model can be asked."),
            f"{model}/stats": (found.stats, "Statistics of the model, of this process."),
        }
    infers = ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer")
    return [
        *(
            Endpoint(
                method="GET",
                path=path,
                handle=handle,
                summary=summary,
                errors=(400, 404),
                always=path == "/v2/health/live",
            )
            for path, (handle, summary) in gets.items()
        ),
        *(
            Endpoint(
                method="POST",
                path=path,
                handle=found.infer,
                body=bytes,
                errors=(400, 404, 415, 422),
                summary="Score the candidates of a user.",
                work=True,
            )
            for path in infers
        ),
    ]


class _Protocol:
    def __init__(self, service: "ScorerService") -> None:
        self._service = service
        self._statistics = Statistics()

    async def server(self, _: Call) -> Reply:
        return Reply({"name": "hashtab", "version": version("hashtab"), "extensions": _EXTENSIONS})

    async def live(self, _: Call) -> Reply:
        return Reply({"live": True})

    async def ready(self, _: Call) -> Reply:
        reason = "draining" if self._service.draining else self._service.not_ready()
        if reason is not None:
            raise HttpError(503, reason, retry_after_s=1)
        return Reply({"ready": True})

    async def model_ready(self, call: Call) -> Reply:
        served = self._asked(call)
        return Reply({"name": self._service.settings.name, "ready": served is not None})

    async def metadata(self, call: Call) -> Reply:
        served, name = self._asked(call), self._service.settings.name
        return Reply(
            {
                "name": name,
                "versions": [served.model.version],
                "platform": "hashtab",
                "inputs": [
                    {"name": name, "datatype": datatype, "shape": shape}
                    for name, (datatype, shape) in inputs_of(served).items()
                ],
                "outputs": [{"name": SCORES, "datatype": "FP32", "shape": [-1]}],
                "parameters": msgspec.to_builtins(served.model),
            }
        )

    async def stats(self, call: Call) -> Reply:
        served = self._asked(call)
        name = self._service.settings.name
        return Reply({"model_stats": [self._statistics.plain(name, served)]})

    async def infer(self, call: Call) -> Reply:
        begun_ns = time.perf_counter_ns()
        served = self._asked(call)
        try:
            reply = self._infer(call, served)
        except HttpError:
            self._statistics.add(begun_ns, succeeded=False)
            raise
        self._statistics.add(begun_ns, succeeded=True)
        return reply

    def _asked(self, call: Call) -> Served:
        """Return the generation of the model and version that a path names."""
        served, known = self._service.current(), self._service.settings.name
        model, wanted = call.path.get("model", known), call.path.get("version")
        if model != known:
            raise HttpError(404, f"there is no model {model[:80]!r} here; it is {known!r}", "model")
        if wanted not in (None, served.model.version):
            raise HttpError(
                404,
                f"version {wanted[:80]!r} is not served; it is {served.model.version!r}",
                "version",
            )
        return served

    def _infer(self, call: Call, served: Served) -> Reply:
        if call.header("content-encoding") not in (None, "identity"):
            raise HttpError(415, "compressed bodies are not read", "content-encoding")
        request, values = parse(
            call.body, call.header(HEADER_LENGTH), self._service.settings.max_candidates
        )
        binary = _binary(request)
        _check_inputs(request, served)
        try:
            scored = score_items(
                self._service,
                served,
                _single(USER, values[USER]),
                values[ITEMS],
                {n: v[0] if len(v) == 1 else v for n, v in values.items() if n not in _RESERVED},
                _time(values),
            )
        except ContextError as error:
            raise wrong(error.feature, str(error)) from error
        header = {
            "model_name": self._service.settings.name,
            "model_version": served.model.version,
            "id": request.id,
            "parameters": {
                "history": scored.history.source,
                "degraded": scored.history.degraded or "",
                "digest": served.model.digest,
                "fingerprint": served.model.fingerprint,
                "unknown_items": scored.unknown_items,
                "missing_context": scored.missing_context,
            },
        }
        body, length = answer(header, SCORES, scored.scores, binary)
        if length is None:
            return Reply(body)
        return Reply(
            body, headers={HEADER_LENGTH: str(length)}, media_type="application/octet-stream"
        )


def inputs_of(served: Served) -> dict[str, tuple[str, list[int]]]:
    """Return datatype and shape of each input; -1 is the number of candidates."""
    manifest = served.manifest
    inputs = {
        USER: ("BYTES" if manifest.text_users else "INT64", [1]),
        ITEMS: ("BYTES" if manifest.text_items else "INT64", [-1]),
    }
    for name in served.context.encoders:
        encoder = served.bundle.encoders[name]
        datatype = "FP64"
        if isinstance(encoder, Vocabulary):
            integers = encoder.values and isinstance(encoder.values[0], int)
            datatype = "INT64" if integers else "BYTES"
        inputs[name] = datatype, [-1]
    if manifest.time_features:
        inputs[TIME] = "INT64", [1]
    return inputs


def _check_inputs(request: InferRequest, served: Served) -> None:
    given = {tensor.name: tensor.datatype for tensor in request.inputs}
    known = inputs_of(served)
    for name in given:
        if name not in known:
            raise wrong(name, f"is not read; the model reads {', '.join(known)}")
    for name in (USER, ITEMS):
        if name not in given:
            raise wrong(name, "is missing")
        if given[name] != BYTES and "INT" not in given[name]:
            raise wrong(name, f"must be integers or BYTES, got {given[name]}")


def _binary(request: InferRequest) -> bool:
    binary = request.parameters.get("binary_data_output", False)
    for output in request.outputs:
        if output.name != SCORES:
            raise wrong(output.name, f"is no output; the model has {SCORES}")
        binary = output.parameters.get("binary_data", binary)
        if "classification" in output.parameters:
            raise wrong(output.name, "has no classes: ask for it without classification")
    return binary is True


def _single(name: str, values: list[Value]) -> Any:
    if len(values) != 1:
        raise wrong(name, f"must have shape [1], got {len(values)} values")
    return values[0]


def _time(values: Mapping[str, list[Value]]) -> int | None:
    if TIME not in values:
        return None
    given = _single(TIME, values[TIME])
    if isinstance(given, str):
        try:
            given = msgspec.convert(given, datetime)
        except msgspec.ValidationError as error:
            raise wrong(TIME, f"must be a time as of RFC 3339 or microseconds: {error}") from error
    if isinstance(given, float | bool):
        raise wrong(TIME, "must be INT64 microseconds since 1970 UTC, or a text as of RFC 3339")
    return microseconds(given)
