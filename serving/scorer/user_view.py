"""`GET /v1/users/{user}`: what the scorer can read of a user, for people."""

from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from hashtab.serving.bse.messages import iso
from hashtab.serving.http import Call, Endpoint, Reply
from hashtab.serving.scorer.champion import ModelName, Served
from hashtab.serving.scorer.log import events_of
from hashtab.serving.scorer.tables import Degraded, History
from hashtab.serving.scorer.users import user_of
from hashtab.serving.store import Event

if TYPE_CHECKING:
    from hashtab.serving.scorer.service import ScorerService

_SHOWN = 20  # behaviours


class TableView(msgspec.Struct):
    """A user's table of the model that is served.

    Args:
        behaviours: in the table.
        buckets_filled: that hold any.
        buckets: of all groups.
        revision: writes of the record.
        watermark: events before it are in the table, or came too late.
    """

    behaviours: int
    buckets_filled: int
    buckets: int
    revision: int
    watermark: str


class Past(msgspec.Struct):
    """One behaviour of the log.

    Args:
        item: that was met.
        time: when.
        name: of the item, for people; null where none is known.
    """

    item: int | str
    time: str
    name: str | None


class UserView(msgspec.Struct):
    """What is known of a user.

    Args:
        table: null where none can be read.
        behaviours: the latest of the log, 20 at most, newest first; null where the log cannot be
            read.
        model: whose table it is.
        history: whether the user's table was read.
        degraded: why it was not; null where it was, or where the model reads none.
    """

    table: TableView | None
    behaviours: list[Past] | None
    model: ModelName
    history: Literal["table", "empty"]
    degraded: Degraded | None


def endpoints(service: "ScorerService") -> list[Endpoint]:
    """Return the endpoint of users."""

    async def show(call: Call) -> Reply:
        served = service.current()
        user = user_of(call.path["user"], served.manifest.text_users)
        history = service.tables.history(served, user)
        events: list[Event] | None = []
        if user is not None:
            events = await events_of(service.tables, user, _SHOWN)
        past = None
        if events is not None:
            past = [Past(e.item, iso(e.time), service.names.get(str(e.item))) for e in events[::-1]]
        return Reply(
            UserView(
                table=_table(served, history),
                behaviours=past,
                model=served.model,
                history=history.source,
                degraded=history.degraded,
            )
        )

    return [
        Endpoint(
            method="GET",
            path="/v1/users/{user}",
            handle=show,
            replies=UserView,
            summary="Show a user's table and latest behaviours.",
            protected=True,
        )
    ]


def _table(served: Served, history: History) -> TableView | None:
    record = history.record
    if history.source == "empty":
        return None
    return TableView(
        behaviours=record.behaviours,
        buckets_filled=int(np.any(record.table, axis=-1).sum()),
        buckets=served.layout.rows,
        revision=record.revision,
        watermark=iso(record.watermark),
    )
