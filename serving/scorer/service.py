"""The scorer of one process: its model, its tables, and the tasks that look after both."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import Awaitable, Callable, Sequence

from hashtab.serving.http import Endpoint, HttpError, Service
from hashtab.serving.scorer import (
    explain,
    open_inference,
    page,
    recommend,
    repository,
    score,
    user_view,
)
from hashtab.serving.scorer.champion import Served
from hashtab.serving.scorer.desired import StateFolder
from hashtab.serving.scorer.following import follow
from hashtab.serving.scorer.names import read_names
from hashtab.serving.scorer.settings import ScorerSettings
from hashtab.serving.scorer.swapping import Swapper
from hashtab.serving.scorer.tables import Tables

_LOG = logging.getLogger(__name__)
_AGAIN_S = 2.0
_MODULES = (score, recommend, explain, user_view, open_inference, repository)


class ScorerService(Service):
    """Scores candidates with the model that is followed.

    Args:
        settings: of the scorer.

    Raises:
        SettingsError: if the file of names cannot be read.

    Attributes:
        served: the generation in use, replaced between two requests; None before the first.
        tables: of users.
        swapper: brings other generations into use.
        names: of items, for people.
        state: files shared with other processes of the server.
    """

    name = "scorer"

    def __init__(self, settings: ScorerSettings) -> None:
        self.settings = settings
        self.served: Served | None = None
        self.state = StateFolder(settings.state)
        self.tables = Tables(settings.store, settings.store_deadline_ms / 1000)
        self.swapper = Swapper(
            self.state, self.tables, settings.coverage, lambda: self.served, self._use
        )
        self.names = read_names(settings.names) if settings.names else {}
        self._tasks: list[asyncio.Task[None]] = []

    def endpoints(self) -> Sequence[Endpoint]:
        """Return the endpoints of all modules."""
        own = [endpoint for module in _MODULES for endpoint in module.endpoints(self)]
        return [*own, *page.endpoints()]

    def current(self) -> Served:
        """Return the generation in use.

        Raises:
            HttpError: 503 before the first.
        """
        if self.served is None:
            raise HttpError(503, str(self.not_ready()), retry_after_s=1)
        return self.served

    async def start(self) -> None:
        """Begin to look after the model and the tables; neither need be there."""
        if self.tables.named:
            await self.tables.look(None)
        else:
            _LOG.warning("no store of tables was named (--store); all histories are empty")
        self._tasks = [
            asyncio.create_task(_go_on(work))
            for work in (
                lambda: self.tables.watch(lambda: self.served),
                self.swapper.follow,
                lambda: follow(self.settings, self.state),
            )
        ]

    async def stop(self) -> None:
        """End the tasks and let go of the store."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.swapper.close()
        self.tables.close()

    def not_ready(self) -> str | None:
        """Say why nothing is served; None if something is, be it without tables."""
        if self.served is not None:
            return None
        waiting = self.swapper.waiting
        reason = waiting.reason if waiting else self.state.followed().problem
        return f"no model is served yet: {reason or 'it is being loaded'}"

    def _use(self, served: Served) -> None:
        if self.served is None:
            # What the first model has loaded lives long: collections need not visit it.
            gc.collect()
            gc.freeze()
        self.served = served


async def _go_on(work: Callable[[], Awaitable[None]]) -> None:
    """Do work that ends only when it is cancelled, whatever it meets on the way."""
    while True:
        try:
            await work()
        except Exception:
            _LOG.exception("what looks after model or tables failed; it is begun again")
        await asyncio.sleep(_AGAIN_S)
