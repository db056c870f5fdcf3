"""`POST /v1/recommend`: from a user to ranked items, retrieved from all and scored, in one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from hashtab.serving.bse.model import Model
from hashtab.serving.bundle import Float32
from hashtab.serving.http import Call, Endpoint, HttpError, Reply
from hashtab.serving.items import Item
from hashtab.serving.retrieval import seen_rows
from hashtab.serving.scorer import metrics
from hashtab.serving.scorer.champion import ModelName, Served
from hashtab.serving.scorer.context import Context, ContextError
from hashtab.serving.scorer.log import events_of
from hashtab.serving.scorer.score import microseconds
from hashtab.serving.scorer.tables import Degraded, History
from hashtab.serving.scorer.users import user_of
from hashtab.serving.scorer.values import Value
from hashtab.serving.store import User

if TYPE_CHECKING:
    from hashtab.serving.scorer.service import ScorerService

Int64 = NDArray[np.int64]


_ALLOWED = 50_000  # items of one request, each of which costs microseconds


class RecommendRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A user to recommend items to.

    Args:
        user: as the log that the model was trained on names users; null for an unknown one.
        count: items wanted.
        candidates: items that are retrieved and scored, of which the best are the answer.
        exclude_seen: leave out what the user has met before, if their history can be read.
        allow: items of which the answer may consist; all by default.
        context: context feature -> one value; what is not given is missing.
        time: of the request, where the model reads it: RFC 3339, UTC where it has no offset, or
            microseconds since 1970 UTC.
    """

    user: int | float | str | None
    count: Annotated[int, msgspec.Meta(ge=1)] = 20
    candidates: Annotated[int, msgspec.Meta(ge=1)] = 500
    exclude_seen: bool = True
    allow: Annotated[list[int | float | str | None], msgspec.Meta(max_length=_ALLOWED)] | None = (
        None
    )
    context: dict[str, Value] = {}
    time: datetime | int | None = None


class Recommended(msgspec.Struct):
    """One item of an answer.

    Args:
        item: as the catalogue names it.
        score: probability.
        similarity: by which it was retrieved: the logarithm of how much likelier the user meets
            this item than another; null where nothing was retrieved, but all allowed were scored.
        name: for people; null where none is known.
    """

    item: int | str
    score: float
    similarity: float | None
    name: str | None


class RecommendReply(msgspec.Struct):
    """Ranked items, and what they rest on.

    Args:
        items: best first. Without a history they are chosen from those that are met most; there
            are none where the index does not know which these are.
        candidates: items that were scored.
        model: that scored.
        index: digest of the index, null where there is none.
        history: whether the user's table was read.
        degraded: why it was not; null where it was, or where the model reads none.
        unknown_items: allowed items that the catalogue does not know, and which are left out.
        missing_context: candidates without a value of some context feature.
    """

    items: list[Recommended]
    candidates: int
    model: ModelName
    index: str | None
    history: Literal["table", "empty"]
    degraded: Degraded | None
    unknown_items: int
    missing_context: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Retrieved:
    """The candidates of one answer. C items.

    Args:
        rows: `[C]`, catalogue rows.
        similarity: `[C]`; None where nothing was ranked yet.
    """

    rows: Int64
    similarity: Float32 | None


def retrieve(
    served: Served, history: History, count: int, seen: Int64 | None, allowed: Int64 | None
) -> Retrieved:
    """Find candidates for a user.

    Args:
        served: the generation of model and index.
        history: of the user.
        count: candidates wanted.
        seen: catalogue rows to leave out; None for none.
        allowed: catalogue rows to choose from; None for all.

    Raises:
        HttpError: if there is neither an index nor anything to choose from.
    """
    index = served.retrieval
    nothing_known = history.record.behaviours == 0 and not (index and index.knows_popularity)
    if index is not None and not nothing_known:
        found = index.search(history.record, count, excluded=seen, allowed=allowed)
        return Retrieved(rows=found.rows, similarity=found.similarity)
    if allowed is not None:
        left = allowed if seen is None else allowed[~np.isin(allowed, seen)]
        return Retrieved(rows=left[:count], similarity=None)
    if index is None:
        raise HttpError(
            409,
            f"there is no index of the items of model {served.model.version}: build it with "
            "pipelines/build_index.py and start the scorer again, or name items in allow",
        )
    return Retrieved(rows=np.empty(0, np.int64), similarity=None)


async def seen_by(
    service: "ScorerService", served: Served, user: User | None, history: History
) -> Int64 | None:
    """Return the catalogue rows of what a user has met; None where no one knows.

    The model's counter of items tells, which counts all there ever was; without one, the log.
    """
    if history.degraded is not None or user is None:
        return None
    rows = seen_rows(served.bundle, history.record)
    if rows is None:
        events = await events_of(service.tables, user)
        rows = Model(served.bundle, served.items).rows(events or [])
        rows = np.unique(rows[rows >= 0])
    return rows


def encode_context(
    served: Served, given: dict[str, Value], time: datetime | int | None, count: int
) -> Context:
    """Encode the context of a request, the same for all candidates.

    Raises:
        HttpError: naming the feature that cannot be encoded.
    """
    try:
        return served.context.encode(given, microseconds(time), count)
    except ContextError as error:
        name = error.feature
        raise HttpError(422, f"context {name!r} {error}", f"context.{name}") from error


def known_rows(served: Served, allow: Sequence[Item] | None) -> tuple[Int64 | None, int]:
    """Return distinct catalogue rows of allowed items, in order, and how many items are unknown."""
    if allow is None:
        return None, 0
    rows = served.items.rows(allow)
    known = rows[rows >= 0]
    return known[np.sort(np.unique(known, return_index=True)[1])], len(rows) - len(known)


def ranked(
    service: "ScorerService", served: Served, found: Retrieved, scores: Float32, count: int
) -> list[Recommended]:
    """Return the best of scored candidates, those of one score in the order of retrieval."""
    best = np.argsort(-scores, kind="stable")[:count]
    items = served.catalogue.items.gather(found.rows[best]).to_list()
    similarity: list[float | None] = [None] * len(best)
    if found.similarity is not None:
        similarity = found.similarity[best].tolist()
    pairs = zip(items, scores[best].tolist(), similarity, strict=True)
    return [
        Recommended(item=item, score=score, similarity=near, name=service.names.get(str(item)))
        for item, score, near in pairs
    ]


def endpoints(service: "ScorerService") -> list[Endpoint]:
    """Return the endpoint of recommendations."""

    async def recommend(call: Call) -> Reply:
        asked: RecommendRequest = call.body
        limit = service.settings.max_candidates
        if asked.candidates > limit:
            raise HttpError(
                422, f"candidates must be at most {limit}, got {asked.candidates}", "candidates"
            )
        served = service.current()
        user = user_of(asked.user, served.manifest.text_users)
        allowed, unknown = known_rows(served, asked.allow)
        history = service.tables.history(served, user)
        seen = await seen_by(service, served, user, history) if asked.exclude_seen else None
        found = retrieve(served, history, asked.candidates, seen, allowed)
        context = encode_context(served, asked.context, asked.time, len(found.rows))
        scores = served.score(history.record, found.rows, context.columns)
        metrics.CANDIDATES.observe(len(found.rows))
        return Reply(
            RecommendReply(
                items=ranked(service, served, found, scores, asked.count),
                candidates=len(found.rows),
                model=served.model,
                index=served.retrieval.manifest.digest if served.retrieval else None,
                history=history.source,
                degraded=history.degraded,
                unknown_items=unknown,
                missing_context=context.missing,
            )
        )

    return [
        Endpoint(
            method="POST",
            path="/v1/recommend",
            handle=recommend,
            body=RecommendRequest,
            replies=RecommendReply,
            errors=(409,),
            summary="Recommend items to a user, out of all or of those allowed.",
            protected=True,  # what is left out tells what the user has met
            work=True,
        )
    ]
