"""`POST /v1/score`: the candidates of one user, scored in the order asked or best first."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import numpy as np

from hashtab.serving.bundle import Float32
from hashtab.serving.http import Call, Endpoint, HttpError, Reply
from hashtab.serving.items import Item
from hashtab.serving.scorer import metrics
from hashtab.serving.scorer.champion import ModelName, Served
from hashtab.serving.scorer.context import ContextError, Given
from hashtab.serving.scorer.tables import Degraded, History
from hashtab.serving.scorer.users import user_of
from hashtab.serving.scorer.values import Value

if TYPE_CHECKING:
    from hashtab.serving.scorer.service import ScorerService

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_INT64 = np.iinfo(np.int64)


class ScoreRequest(msgspec.Struct, forbid_unknown_fields=True):
    """One user and the items to score.

    Args:
        user: as the log that the model was trained on names users; null for an unknown one.
        items: C candidates, as that log names items.
        context: context feature -> one value, or a list with one for each item. What is not given
            is missing; what the model does not read is not looked at.
        time: of the request, where the model reads it: RFC 3339, UTC where it has no offset, or
            microseconds since 1970 UTC.
        top: keep so many, best first; null keeps all in the order given.
    """

    user: int | float | str | None
    items: list[int | float | str | None]
    context: dict[str, Value | list[Value]] = {}
    time: datetime | int | None = None
    top: Annotated[int, msgspec.Meta(ge=1)] | None = None


class ScoreReply(msgspec.Struct):
    """Scores, and what they rest on.

    Args:
        scores: probabilities of the items.
        items: in the order of the scores.
        model: that scored.
        history: whether the user's table was read.
        degraded: why it was not; null where it was, or where the model reads none.
        unknown_items: candidates that the model's catalogue does not know.
        missing_context: candidates without a value of some context feature.
    """

    scores: list[float]
    items: list[int | float | str | None]
    model: ModelName
    history: Literal["table", "empty"]
    degraded: Degraded | None
    unknown_items: int
    missing_context: int


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of one request.

    Args:
        scores: `[C]` float32.
        history: that they rest on.
        unknown_items: candidates that the catalogue does not know.
        missing_context: candidates without a value of some context feature.
    """

    scores: Float32
    history: History
    unknown_items: int
    missing_context: int


def score_items(
    service: "ScorerService",
    served: Served,
    user: float | str | None,
    items: Sequence[Item],
    context: Given,
    time: int | None,
) -> Scored:
    """Score a user's candidates with one generation of model and tables.

    Args:
        service: whose tables are read.
        served: the generation.
        user: as a request gives it.
        items: C candidates.
        context: context feature -> one value, or one for each candidate.
        time: of the request, microseconds since 1970 UTC.

    Raises:
        HttpError: if there are too many candidates.
        ContextError: naming a feature with values of the wrong kind or number.
    """
    limit = service.settings.max_candidates
    if len(items) > limit:
        raise HttpError(
            422, f"at most {limit} candidates are scored at once, got {len(items)}", "items"
        )
    rows = served.items.rows(items)
    encoded = served.context.encode(context, time, len(rows))
    history = service.tables.history(served, user_of(user, served.manifest.text_users))
    scores = served.score(history.record, rows, encoded.columns)
    unknown = int(np.count_nonzero(rows < 0))
    metrics.CANDIDATES.observe(len(rows))
    if unknown:
        metrics.UNKNOWN_ITEMS.inc(unknown)
    return Scored(scores, history, unknown, encoded.missing)


def microseconds(time: datetime | int | None) -> int | None:
    """Return a time of a request as microseconds since 1970 UTC.

    Raises:
        HttpError: if it does not fit 64 bits.
    """
    if isinstance(time, datetime):
        moment = time if time.tzinfo else time.replace(tzinfo=UTC)
        return (moment - _EPOCH) // _MICROSECOND
    if time is not None and not _INT64.min <= time <= _INT64.max:
        raise HttpError(422, "time must be microseconds since 1970 that fit 64 bits", "time")
    return time


def endpoints(service: "ScorerService") -> list[Endpoint]:
    """Return the endpoint of scores."""

    async def score(call: Call) -> Reply:
        asked: ScoreRequest = call.body
        served = service.current()
        try:
            scored = score_items(
                service, served, asked.user, asked.items, asked.context, microseconds(asked.time)
            )
        except ContextError as error:
            name = error.feature
            raise HttpError(422, f"context {name!r} {error}", f"context.{name}") from error
        items, scores = asked.items, scored.scores
        if asked.top is not None:
            best = np.argsort(-scores, kind="stable")[: asked.top]
            items, scores = [items[i] for i in best.tolist()], scores[best]
        return Reply(
            ScoreReply(
                scores=scores.tolist(),
                items=items,
                model=served.model,
                history=scored.history.source,
                degraded=scored.history.degraded,
                unknown_items=scored.unknown_items,
                missing_context=scored.missing_context,
            )
        )

    return [
        Endpoint(
            method="POST",
            path="/v1/score",
            handle=score,
            body=ScoreRequest,
            replies=ScoreReply,
            summary="Score the candidates of a user.",
            work=True,
        )
    ]
