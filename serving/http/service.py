"""What a service is made of: endpoints, what their handlers get, and what they answer."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl


class Call:
    """One request, checked and decoded, as a handler gets it.

    Args:
        body: an object of `Endpoint.body`; the bytes as they came where that is `bytes`; None where
            it is None.
        path: the values of the path's parameters, percent-decoded.
        query_string: as it came.
        headers: by lower-case name.
        request_id: of `X-Request-Id`, or made here; the answer and the log carry it.
        deadline: of `time.monotonic()`, in seconds: who asked waits no longer than that.
    """

    def __init__(
        self,
        *,
        body: Any,
        path: Mapping[str, str],
        query_string: bytes,
        headers: Mapping[bytes, bytes],
        request_id: str,
        deadline: float,
    ) -> None:
        self.body = body
        self.path = path
        self.request_id = request_id
        self.deadline = deadline
        self._query_string = query_string
        self._headers = headers

    @cached_property
    def query(self) -> Mapping[str, str]:
        """The query's values by name; of a name given twice, the last."""
        text = self._query_string.decode("latin-1")
        return dict(parse_qsl(text, keep_blank_values=True))

    def header(self, name: str) -> str | None:
        """Return a header's value, None if the request has none of that name."""
        value = self._headers.get(name.lower().encode("latin-1"))
        return None if value is None else value.decode("latin-1")


class Reply:
    """An answer.

    Args:
        content: what msgspec encodes as JSON, or bytes, which are sent as they are.
        status: of HTTP.
        headers: beside Content-Type, Content-Length and X-Request-Id.
        media_type: of the content.
    """

    __slots__ = ("content", "headers", "media_type", "status")

    def __init__(
        self,
        content: Any,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str = "application/json",
    ) -> None:
        self.content = content
        self.status = status
        self.headers = headers
        self.media_type = media_type


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One method of one path.

    Args:
        method: `GET`, `POST`, ...
        path: in Starlette's syntax, `/v1/users/{user}`.
        handle: answers a call; raises `HttpError` for what is wrong with it.
        body: a type that msgspec decodes JSON to; `bytes` for the body as it came; None if no body
            is read.
        replies: the type of the answer with status 200, for `/openapi.json`; `bytes` for an answer
            that is not JSON; None for any JSON.
        errors: statuses beyond the common ones that `handle` answers with, for `/openapi.json`.
        summary: one line for `/openapi.json`.
        protected: needs the bearer token where the settings have one.
        always: whether it answers before the service has started.
        work: takes the processor: one such call at a time in a process, in the order of arrival,
            refused early when too many wait or its deadline has passed. Others run side by side.
    """

    method: str
    path: str
    handle: Callable[[Call], Awaitable[Reply]]
    summary: str
    body: Any = None
    replies: Any = None
    errors: Sequence[int] = field(default=())
    protected: bool = False
    always: bool = False
    work: bool = False


class Service(ABC):
    """What a server serves; made once in each process.

    Attributes:
        name: of the service, in logs and in `/openapi.json`.
        draining: whether clients should go elsewhere; set by the server.
    """

    name: str
    draining = False

    @abstractmethod
    def endpoints(self) -> Sequence[Endpoint]:
        """Return all endpoints; asked once, before `start`."""

    async def start(self) -> None:  # noqa: B027  a service may have nothing to start
        """Load what answers need; until it returns, all endpoints answer 503."""

    async def stop(self) -> None:  # noqa: B027  a service may have nothing to stop
        """Finish what is in flight and release everything; called once, after the last answer."""

    def not_ready(self) -> str | None:
        """Say why no requests should be sent here now; None if they should.

        `/health/ready` asks; requests that come all the same are handled.
        """
        return None
