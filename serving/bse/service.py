"""The BSE service: events in, durable before they are answered, and what is kept of a user."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from hashtab.serving.alias import Told, follow_alias, is_alias
from hashtab.serving.bse import metrics
from hashtab.serving.bse.applying import Outcome
from hashtab.serving.bse.building import add_model, start_with, withdraw
from hashtab.serving.bse.group_commit import GroupCommit, TooManyWaitingError
from hashtab.serving.bse.keeper import Keeper
from hashtab.serving.bse.messages import (
    LONGEST_USER,
    BundleIn,
    EventsIn,
    EventsOut,
    ForgottenOut,
    ModelOut,
    ModelsOut,
    UserOut,
    iso,
    to_events,
)
from hashtab.serving.bse.settings import BseSettings
from hashtab.serving.bse.users import forget, show
from hashtab.serving.bse.writer import Writer
from hashtab.serving.errors import BundleError
from hashtab.serving.http import Call, Endpoint, HttpError, Reply, Service
from hashtab.serving.store import (
    Event,
    KeptModel,
    StoreError,
    TableStore,
    User,
    open_store,
)

if TYPE_CHECKING:
    from hashtab.serving.bse.stream import StreamSource

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_COUNTED = {outcome: metrics.EVENTS.labels("http", outcome.value) for outcome in Outcome}
_AGAIN_S = 1.0  # after which a caller may try again


class BseService(Service):
    """One process of the service; several may share a store.

    Args:
        settings: what it keeps.
    """

    name = "bse"

    def __init__(self, settings: BseSettings) -> None:
        self._settings = settings
        self._store: TableStore
        self._writer: Writer
        self._commits: GroupCommit
        self._keeper: Keeper
        self._stream: StreamSource | None = None
        self._following: asyncio.Task[None] | None = None

    def endpoints(self) -> Sequence[Endpoint]:
        """Return what it answers."""
        return [
            Endpoint(
                method="POST",
                path="/v1/events",
                handle=self._events,
                body=EventsIn,
                replies=EventsOut,
                summary="Take behaviours; answered when they are durable and in the tables.",
                errors=(429, 503),
                protected=True,
            ),
            Endpoint(
                method="GET",
                path="/v1/users/{user}",
                handle=self._show,
                replies=UserOut,
                summary="Show what is kept of a user.",
                errors=(404, 422, 503),
                protected=True,
            ),
            Endpoint(
                method="DELETE",
                path="/v1/users/{user}",
                handle=self._forget,
                replies=ForgottenOut,
                summary="Forget a user everywhere, the log included.",
                errors=(404, 422, 503),
                protected=True,
            ),
            Endpoint(
                method="GET",
                path="/v1/models",
                handle=self._models,
                replies=ModelsOut,
                summary="List the models whose tables are kept.",
                errors=(503,),
            ),
            Endpoint(
                method="DELETE",
                path="/v1/models/{fingerprint}",
                handle=self._withdraw,
                replies=ModelsOut,
                summary="Keep a model's tables no longer; they are dropped.",
                errors=(404, 422, 503),
                protected=True,
            ),
            Endpoint(
                method="POST",
                path="/v1/models",
                handle=self._add_model,
                body=BundleIn,
                replies=ModelOut,
                summary="Keep the tables of a model; they are built in the background.",
                errors=(409, 503),
                protected=True,
            ),
        ]

    async def start(self) -> None:
        """Open the store, put the settings into the plan, and begin to work."""
        await asyncio.to_thread(self._open)
        if self._settings.bundle is not None and is_alias(self._settings.bundle):
            self._following = asyncio.create_task(self._follow(self._settings.bundle))

    def _open(self) -> None:
        self._store = open_store(self._settings.store)
        for loss in self._store.losses():
            _log.warning("%s may lose what was acknowledged: %s", self._store.name, loss)
        self._writer = Writer(self._store)
        window_us, count = self._settings.window_us, self._settings.count
        self._writer.plan(lambda plan: replace(plan, window_us=window_us, count=count))
        if self._settings.bundle is not None and not is_alias(self._settings.bundle):
            start_with(self._writer, self._settings.bundle)
        try:
            self._writer.models(self._store.plan())
        except BundleError as error:  # events get 503 until it is mended or withdrawn
            _log.error("a model of the plan cannot be opened: %s", error)
        self._commits = GroupCommit(self._writer)
        self._keeper = Keeper(self._writer, self._settings.keep_old_s)
        if self._settings.stream is not None:
            from hashtab.serving.bse.stream import StreamSource  # its client is an extra

            self._stream = StreamSource(self._settings.stream, self._commits, self._writer)

    async def stop(self) -> None:
        """Write what was taken, and let go of the store."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await asyncio.to_thread(self._close)

    async def _follow(self, alias: str) -> None:
        """Keep the tables of whatever an alias names."""
        uri = self._settings.tracking_uri
        while True:
            try:
                async with contextlib.aclosing(follow_alias(alias, uri)) as heard:
                    async for told in heard:
                        await self._hear(told)
            except Exception as error:  # whatever it is, the alias must be followed on
                self._complain(f"{alias} is followed anew: {error}")
                await asyncio.sleep(_AGAIN_S)

    async def _hear(self, told: Told) -> None:
        while told.folder is not None:
            try:
                await self._add(told.folder)
                return
            except (BundleError, StoreError) as error:
                self._complain(f"the tables of {told.folder} are not kept yet: {error}")
                await asyncio.sleep(_AGAIN_S)
        if told.error is not None:
            self._complain(told.error)

    def _complain(self, problem: str) -> None:
        metrics.FAILURES.labels("alias").inc()
        _log.warning("%s; the tables of the present models are kept on", problem)

    async def _add(self, folder: str) -> tuple[bytes, KeptModel]:
        added = await asyncio.to_thread(add_model, self._writer, folder)
        self._keeper.wake()
        return added

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.stop()
        self._keeper.stop()
        self._commits.stop()
        self._store.close()

    def not_ready(self) -> str | None:
        """Say why events cannot be written now; None if they can."""
        return self._keeper.failing

    async def _events(self, call: Call) -> Reply:
        events = to_events(call.body.events, self._writer.text_users)
        try:
            async with asyncio.timeout(call.deadline - time.monotonic()):
                outcomes = await self._commits.written(events)
        except TimeoutError as error:
            raise HttpError(
                503,
                "the store has not answered in time: the events may be written or not, send them "
                "again under the same ids",
                retry_after_s=_AGAIN_S,
            ) from error
        except TooManyWaitingError as error:
            raise HttpError(
                429, "too many events wait to be written; send them again", retry_after_s=_AGAIN_S
            ) from error
        except (StoreError, BundleError) as error:
            metrics.FAILURES.labels("write").inc()
            raise HttpError(
                503, f"not written, send them again: {error}", retry_after_s=_AGAIN_S
            ) from error
        return Reply(_answer(events, outcomes))

    async def _show(self, call: Call) -> Reply:
        user = self._user(call)
        return Reply(_found(await self._do(lambda: self._shown(user)), user))

    async def _forget(self, call: Call) -> Reply:
        user = self._user(call)
        return Reply(_found(await self._do(partial(forget, self._store, user)), user))

    async def _models(self, _: Call) -> Reply:
        plan = await self._do(self._store.plan)
        return Reply(ModelsOut([_model(name, kept) for name, kept in plan.models.items()]))

    async def _withdraw(self, call: Call) -> Reply:
        name = call.path["fingerprint"]
        if not re.fullmatch("[0-9a-f]{16}", name):
            raise HttpError(422, "a fingerprint is 16 hexadecimal digits", field="fingerprint")
        if not await self._do(partial(withdraw, self._writer, bytes.fromhex(name))):
            raise HttpError(404, f"no tables of {name} are kept", field="fingerprint")
        self._keeper.wake()
        return await self._models(call)

    async def _add_model(self, call: Call) -> Reply:
        try:
            fingerprint, kept = await self._add(call.body.bundle)
        except (ValueError, OSError) as error:  # of bundle and store, and of an impossible path
            raise HttpError(409, str(error), field="bundle") from error
        return Reply(_model(fingerprint.hex(), kept))

    def _shown(self, user: User) -> UserOut | None:
        return show(self._store, self._writer.models(self._store.plan()), user)

    def _user(self, call: Call) -> User:
        text, is_text = call.path["user"], self._writer.text_users
        if is_text is None:
            is_text = call.query.get("type") == "text"
        if is_text:
            if len(text) > LONGEST_USER:
                raise HttpError(
                    422, f"no user has more than {LONGEST_USER} characters", field="user"
                )
            return text
        if not re.fullmatch("-?[0-9]{1,19}", text) or not -(2**63) <= int(text) < 2**63:
            raise HttpError(
                422, f"users are whole numbers of 64 bits, got {text[:50]!r}", field="user"
            )
        return int(text)

    async def _do(self, work: Callable[[], Result]) -> Result:
        """Do what waits for the store in a thread."""
        try:
            return await asyncio.to_thread(work)
        except (StoreError, BundleError) as error:
            raise HttpError(503, str(error), retry_after_s=_AGAIN_S) from error


def _answer(events: Sequence[Event], outcomes: Sequence[Outcome]) -> EventsOut:
    for outcome, counter in _COUNTED.items():
        counter.inc(outcomes.count(outcome))
    late = [e.id for e, outcome in zip(events, outcomes, strict=True) if outcome is Outcome.LATE]
    return EventsOut(
        accepted=outcomes.count(Outcome.ACCEPTED),
        duplicate=outcomes.count(Outcome.DUPLICATE),
        late=len(late),
        late_ids=late,
    )


def _found(found: Result | None, user: User) -> Result:
    if found is None:
        raise HttpError(404, f"nothing is kept of user {user!r}", field="user")
    return found


def _model(name: str, kept: KeptModel) -> ModelOut:
    return ModelOut(name, kept.bundle, kept.digest, kept.state, iso(kept.since))
