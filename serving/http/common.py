"""The endpoints that every service has: health, metrics, and the description of the rest."""

from collections.abc import Callable

import msgspec

from hashtab.serving.http import metrics
from hashtab.serving.http.errors import HttpError
from hashtab.serving.http.lifecycle import Lifecycle
from hashtab.serving.http.service import Call, Endpoint, Reply


class Ready(msgspec.Struct):
    """That requests should be sent here."""

    ready: bool


class Common:
    """Answers the common endpoints.

    Args:
        lifecycle: of the service.
        publish: sets the gauges of this process.
    """

    def __init__(self, lifecycle: Lifecycle, publish: Callable[[], None]) -> None:
        self._lifecycle = lifecycle
        self._publish = publish
        self.openapi = b""

    def endpoints(self) -> list[Endpoint]:
        """Return them."""
        return [
            Endpoint(
                method="GET",
                path="/health/live",
                handle=self._live,
                replies=dict[str, bool],
                summary="Whether the process answers at all",
                always=True,
            ),
            Endpoint(
                method="GET",
                path="/health/ready",
                handle=self._ready,
                replies=Ready,
                summary="Whether requests should be sent here; 503 with the reason if not",
                always=True,
            ),
            Endpoint(
                method="GET",
                path="/metrics",
                handle=self._metrics,
                replies=bytes,
                summary="Metrics for Prometheus",
                always=True,
            ),
            Endpoint(
                method="GET",
                path="/openapi.json",
                handle=self._openapi,
                summary="This description",
                always=True,
            ),
        ]

    async def _live(self, _: Call) -> Reply:
        return Reply({"live": True})

    async def _ready(self, _: Call) -> Reply:
        if reason := self._lifecycle.not_ready():
            raise HttpError(503, reason, retry_after_s=1)
        return Reply(Ready(ready=True))

    async def _metrics(self, _: Call) -> Reply:
        self._publish()
        content, media_type = metrics.render()
        return Reply(content, media_type=media_type)

    async def _openapi(self, _: Call) -> Reply:
        return Reply(self.openapi)
