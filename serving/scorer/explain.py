"""`POST /v1/explain`: which past behaviours a score rests on, and what it would be without any."""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from hashtab.serving.bse.messages import iso
from hashtab.serving.bse.model import Model
from hashtab.serving.http import Call, Endpoint, Reply
from hashtab.serving.scorer.champion import ModelName, Served
from hashtab.serving.scorer.log import events_of
from hashtab.serving.scorer.recommend import encode_context
from hashtab.serving.scorer.shares import Shares, shares_of
from hashtab.serving.scorer.tables import Degraded, History
from hashtab.serving.scorer.users import user_of
from hashtab.serving.scorer.values import Value
from hashtab.serving.store import Event, User

if TYPE_CHECKING:
    from hashtab.serving.scorer.service import ScorerService

_SHOWN = 100  # items of one answer


class ExplainRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A user and an item whose score is to be explained.

    Args:
        user: as the log that the model was trained on names users; null for an unknown one.
        item: as that log names items.
        context: context feature -> one value; what is not given is missing.
        time: of the request, where the model reads it: RFC 3339, UTC where it has no offset, or
            microseconds since 1970 UTC.
    """

    user: int | float | str | None
    item: int | float | str | None
    context: dict[str, Value] = {}
    time: datetime | int | None = None


class Behaviour(msgspec.Struct):
    """What one item, met once or several times, has in the interest read for the candidate.

    Args:
        item: that was met.
        time: when it was met last.
        times: how often it was met.
        name: for people; null where none is known.
        weight: of the item's vector in the interest, summed over `times`: for each group that a
            behaviour shares with the candidate, 1 / (groups * norm of the bucket's sum). The
            interest is the sum of weight * vector over all behaviours in the table.
        share: of the interest's length that this comes to; all shares together are 1.
        shared_groups: groups of hash planes in which its bucket is the candidate's.
    """

    item: int | str
    time: str
    times: int
    name: str | None
    weight: float
    share: float
    shared_groups: int


class ExplainReply(msgspec.Struct):
    """A score, and what it rests on.

    Args:
        score: probability.
        score_without_history: the same for a user without any behaviour.
        known_item: whether the model's catalogue knows the item.
        name: of the item, for people; null where none is known.
        behaviours: items that share a bucket with the candidate, the largest share first, 100 at
            most. Empty where the model keeps no table, where there is no log of the user's events,
            or where nothing is shared. A model that also reads the latest behaviours one by one
            has a second interest, of these, which is not taken apart here.
        groups: of hash planes.
        explained: share of the interest that behaviours in the log come to, shown or not; less
            than 1 where the log does not hold all that the table does. Null without an interest.
        in_table: behaviours in the user's table.
        in_log: of these, behaviours that the log holds; null where it cannot be read.
        model: that scored.
        history: whether the user's table was read.
        degraded: why it was not; null where it was, or where the model reads none.
        missing_context: 1 where some context feature has no value.
    """

    score: float
    score_without_history: float
    known_item: bool
    name: str | None
    behaviours: list[Behaviour]
    groups: int
    explained: float | None
    in_table: int
    in_log: int | None
    model: ModelName
    history: Literal["table", "empty"]
    degraded: Degraded | None
    missing_context: int


def merged(events: Sequence[Event], shares: Shares, names: dict[str, str]) -> list[Behaviour]:
    """Return what each item that shares a bucket with the candidate has, the largest first."""
    by_item: dict[int | str, Behaviour] = {}
    columns = shares.weights.tolist(), shares.shares.tolist(), shares.shared_groups.tolist()
    for event, weight, share, shared in zip(events, *columns, strict=True):
        if not shared:
            continue
        found = by_item.get(event.item)
        by_item[event.item] = Behaviour(
            item=event.item,
            time=iso(event.time),
            times=1 + (found.times if found else 0),
            name=names.get(str(event.item)),
            weight=weight + (found.weight if found else 0.0),
            share=share + (found.share if found else 0.0),
            shared_groups=max(shared, found.shared_groups if found else 0),
        )
    return sorted(by_item.values(), key=lambda each: -each.share)


def explained(
    served: Served, history: History, row: int, events: Sequence[Event]
) -> tuple[list[Event], Shares]:
    """Return the events that the table holds, and the share of each in a candidate's interest."""
    encoded = Model(served.bundle, served.items).encode(events)
    held = np.flatnonzero(encoded.held)
    shares = shares_of(
        served.bundle, history.record, row, encoded.codes[held], encoded.vectors[held]
    )
    return [events[i] for i in held.tolist()], shares


def endpoints(service: "ScorerService") -> list[Endpoint]:
    """Return the endpoint of explanations."""

    async def in_table(served: Served, user: User | None, history: History) -> list[Event] | None:
        if user is None or not served.layout.groups or not history.record.behaviours:
            return []
        # The table holds the latest behaviours, as many as it says.
        return await events_of(service.tables, user, history.record.behaviours)

    async def explain(call: Call) -> Reply:
        asked: ExplainRequest = call.body
        served = service.current()
        user = user_of(asked.user, served.manifest.text_users)
        history = service.tables.history(served, user)
        rows = served.items.rows([asked.item])
        context = encode_context(served, asked.context, asked.time, 1)
        events = await in_table(served, user, history)
        behaviours: list[Behaviour] = []
        share = None
        if events:
            held, shares = explained(served, history, int(rows[0]), events)
            behaviours = merged(held, shares, service.names)
            share = float(shares.shares.sum()) if shares.interest.any() else None
        return Reply(
            ExplainReply(
                score=float(served.score(history.record, rows, context.columns)[0]),
                score_without_history=float(served.score(served.empty, rows, context.columns)[0]),
                known_item=bool(rows[0] >= 0),
                name=service.names.get(str(served.item(int(rows[0]), asked.item))),
                behaviours=behaviours[:_SHOWN],
                groups=served.layout.groups,
                explained=share,
                in_table=history.record.behaviours,
                in_log=None if events is None else len(events),
                model=served.model,
                history=history.source,
                degraded=history.degraded,
                missing_context=context.missing,
            )
        )

    return [
        Endpoint(
            method="POST",
            path="/v1/explain",
            handle=explain,
            body=ExplainRequest,
            replies=ExplainReply,
            summary="Say which past behaviours a score rests on.",
            protected=True,
            work=True,
        )
    ]
