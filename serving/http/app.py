"""The ASGI application of a service: from a request to its answer, its metrics and its log line."""

import asyncio
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from starlette.types import Receive, Scope, Send

from hashtab.serving.http import metrics
from hashtab.serving.http.admission import Admission, RefusedError
from hashtab.serving.http.answers import Answer, answer_of, answer_of_error, send_answer
from hashtab.serving.http.bodies import ClientGoneError, check_json, decode_json, read_body
from hashtab.serving.http.common import Common
from hashtab.serving.http.deadlines import timeout_s
from hashtab.serving.http.errors import HttpError
from hashtab.serving.http.lifecycle import Lifecycle, run_lifespan
from hashtab.serving.http.logs import STDERR, RequestLine
from hashtab.serving.http.openapi import describe
from hashtab.serving.http.routes import Measures, Route, Routes
from hashtab.serving.http.service import Call, Reply, Service
from hashtab.serving.http.settings import ServerSettings
from hashtab.serving.http.tokens import Guard
from hashtab.serving.http.tracing import Trace

GONE = "hashtab.gone"  # in the scope's state of a request whose client has left
_CLIENT_GONE = 499  # nginx's status for it; only in logs and metrics

_log = logging.getLogger("hashtab.serving")


class App:
    """Serves one service in one process; its lifespan starts and stops the service.

    Args:
        service: not started yet.
        settings: of the server.

    Raises:
        ValueError: if two endpoints have the same method and path.
    """

    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self.settings = settings
        self.lifecycle = Lifecycle(service)
        self.admission = Admission(settings.max_waiting)
        self.in_flight = 0
        self._guard = Guard(settings.token)
        common = Common(self.lifecycle, self.publish)
        self.routes = [Route(e) for e in (*service.endpoints(), *common.endpoints())]
        common.openapi = describe(service.name, [route.endpoint for route in self.routes], settings)
        self._words = {word for r in self.routes for word in r.endpoint.path.split("/")}
        self._find = Routes(self.routes).find
        self._nowhere = Measures("none")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope; web sockets are closed by returning."""
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "lifespan":
            await run_lifespan(self.lifecycle, receive, send)

    def publish(self) -> None:
        """Set the gauges of this process."""
        metrics.IN_FLIGHT.set(self.in_flight)
        metrics.WAITING.set(self.admission.waiting)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        headers = dict(scope["headers"])
        trace = Trace(headers)
        route = None
        self.in_flight += 1
        try:
            route, path = self._find(scope)
            reply = await self._reply(route, path, scope, receive, headers, trace, began)
            answer = answer_of(reply)
        except HttpError as error:
            if isinstance(error, RefusedError):
                metrics.REFUSED.labels(error.reason).inc()
            answer = answer_of_error(error, trace.request_id)
        except ClientGoneError:
            metrics.REFUSED.labels("gone").inc()
            answer = Answer(_CLIENT_GONE, [], b"")
        except asyncio.CancelledError:  # the time to drain is over
            stopped = HttpError(503, "the server stopped before it had an answer", retry_after_s=1)
            answer = answer_of_error(stopped, trace.request_id)
        except Exception:
            _log.exception("a handler failed", extra={"fields": trace.fields()})
            failed = HttpError(
                500, "the server failed; its log has the reason under the request_id"
            )
            answer = answer_of_error(failed, trace.request_id)
        finally:
            self.in_flight -= 1
        if answer.status != _CLIENT_GONE:
            answer.headers.extend(trace.headers)
            await send_answer(send, answer)
        self._record(route, scope, trace, answer.status, time.monotonic() - began)

    async def _reply(
        self,
        route: Route,
        path: Mapping[str, str],
        scope: Scope,
        receive: Receive,
        headers: Mapping[bytes, bytes],
        trace: Trace,
        began: float,
    ) -> Reply:
        endpoint = route.endpoint
        if not (self.lifecycle.started or endpoint.always):
            raise HttpError(503, "the service is starting", retry_after_s=1)
        if endpoint.protected:
            self._guard.check(headers)
        deadline = began + timeout_s(headers, self.settings.deadline_ms)
        body = None
        if endpoint.body is not None:
            if route.decoder is not None:
                check_json(headers.get(b"content-type"))
            body = await read_body(receive, headers, self.settings.max_body_bytes)
            if endpoint.work:
                self.admission.check_room()  # before the work of decoding
            if route.decoder is not None:
                body = decode_json(route.decoder, body)
        call = Call(
            body=body,
            path=path,
            query_string=scope["query_string"],
            headers=headers,
            request_id=trace.request_id,
            deadline=deadline,
        )
        if not endpoint.work:
            return await endpoint.handle(call)
        await self.admission.take_turn(deadline)
        try:
            if GONE in scope.get("state", ()):
                raise ClientGoneError
            return await endpoint.handle(call)
        finally:
            self.admission.leave()

    def _record(
        self, route: Route | None, scope: Scope, trace: Trace, status: int, seconds: float
    ) -> None:
        measures = self._nowhere if route is None else route.measures
        measures.count(status)
        if status not in (429, 503, _CLIENT_GONE):
            measures.observe(seconds)
        # The template, or of a path that has none the known words: no user's id gets into the log.
        path = self._known_words(scope["path"]) if route is None else route.endpoint.path
        STDERR.add(
            RequestLine(
                time=datetime.now(UTC),
                level="info",
                event="request",
                method=scope["method"],
                path=path,
                status=status,
                ms=round(seconds * 1000, 3),
                request_id=trace.request_id,
                trace_id=trace.trace_id,
            )
        )

    def _known_words(self, path: str) -> str:
        return "/".join(word if word in self._words else "-" for word in path.split("/"))[:200]


def build_app(service: Service, settings: ServerSettings) -> App:
    """Return the ASGI application of a service, for a server of one's own or tests in process.

    Args:
        service: not started yet; the application's lifespan starts and stops it.
        settings: of the server; host, port and processes do not matter here.

    Raises:
        ValueError: if two endpoints have the same method and path.
    """
    return App(service, settings)
