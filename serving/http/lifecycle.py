"""Where a service stands between its start and its end."""

from starlette.types import Receive, Send

from hashtab.serving.http.service import Service


class Lifecycle:
    """What a service has been told, and whether requests should be sent to it.

    Args:
        service: not started yet.

    Attributes:
        service: itself.
        started: whether it has started.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.started = False

    async def start(self) -> None:
        """Start the service."""
        await self.service.start()
        self.started = True

    async def stop(self) -> None:
        """Stop the service."""
        await self.service.stop()

    @property
    def draining(self) -> bool:
        """Whether clients should go elsewhere; requests that come are still answered."""
        return self.service.draining

    @draining.setter
    def draining(self, draining: bool) -> None:
        self.service.draining = draining

    def not_ready(self) -> str | None:
        """Say why no requests should be sent here now; None if they should."""
        if self.draining:
            return "draining"
        return self.service.not_ready() if self.started else "starting"


async def run_lifespan(lifecycle: Lifecycle, receive: Receive, send: Send) -> None:
    """Start a service at ASGI's startup and stop it at its shutdown.

    Args:
        lifecycle: of the service.
        receive: of ASGI.
        send: of ASGI.
    """
    await receive()
    try:
        await lifecycle.start()
    except Exception as error:
        await send({"type": "lifespan.startup.failed", "message": str(error)})
        raise
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await lifecycle.stop()
    await send({"type": "lifespan.shutdown.complete"})
