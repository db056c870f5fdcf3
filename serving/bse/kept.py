"""Which events stay when some arrive: in the log by its plan, in a table by its model's limit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hashtab.serving.store import Event, Head, LogReader, Plan, User

_AT_FIRST = 64  # events that are looked at for being too old


@dataclass(frozen=True, kw_only=True)
class Turnover:
    """What arrives in a user's log and what leaves it.

    Args:
        before: events in the log so far.
        added: new events that stay, in order.
        removed: events of the log that leave it, its earliest, in order.
        refused: new events that are older than what stays, in order.
    """

    before: int
    added: list[Event]
    removed: list[Event]
    refused: list[Event]

    @property
    def after(self) -> int:
        """Events in the log from now on."""
        return self.before + len(self.added) - len(self.removed)

    @property
    def idle(self) -> bool:
        """Whether nothing changes, not even what is late from now on."""
        return not (self.added or self.removed or self.refused)


def turnover(
    log: LogReader, user: User, head: Head, arriving: Sequence[Event], plan: Plan, now: int
) -> Turnover:
    """Decide what a user's log holds from now on.

    Args:
        log: as it is before the change.
        user: whose events these are.
        head: of the user.
        arriving: events that the log does not know.
        plan: says how long and how many events stay.
        now: microseconds.
    """
    late = [event for event in arriving if event.time < head.watermark]
    arriving = [event for event in arriving if event.time >= head.watermark]
    leaving = _too_old(log, user, head, arriving, plan, now)
    surplus = head.events + len(arriving) - (plan.count or head.events + len(arriving))
    if surplus > len(leaving):
        merged = [*log.earliest(user, surplus), *arriving]
        leaving = _ordered(merged)[:surplus]
    gone = {event.id for event in leaving}
    new = {event.id for event in arriving}
    return Turnover(
        before=head.events,
        added=_ordered([event for event in arriving if event.id not in gone]),
        removed=[event for event in leaving if event.id not in new],
        refused=_ordered([*late, *(event for event in arriving if event.id in gone)]),
    )


def _ordered(events: Iterable[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.order)


def _too_old(
    log: LogReader, user: User, head: Head, arriving: Sequence[Event], plan: Plan, now: int
) -> list[Event]:
    if plan.window_us is None:
        return []
    horizon = now - plan.window_us
    stored: list[Event] = []
    if head.events and head.earliest < horizon:
        count = _AT_FIRST
        stored = log.earliest(user, count)
        while len(stored) == count and stored[-1].time < horizon:
            count *= 2
            stored = log.earliest(user, count)
    old = [event for event in (*stored, *arriving) if event.time < horizon]
    return _ordered(old)


def table_change(
    log: LogReader, user: User, change: Turnover, limit: int | None
) -> tuple[list[Event], list[Event]]:
    """Return what a table of the last `limit` events gains and loses; all events when None.

    Args:
        log: as it is before the change.
        user: whose table it is.
        change: of the user's log.
        limit: events of a table.
    """
    added, removed = change.added, change.removed
    if limit is None or change.before + len(added) <= limit:
        return added, removed
    # The table holds the last `limit` of the log; of these the first may be pushed out.
    stays = min(change.before, max(limit - len(added), 0))
    pushed = log.before_last(user, stays, min(change.before, limit) - stays)
    merged = _ordered([*pushed, *added])
    kept = {event.id for event in merged[max(0, len(merged) - (limit - stays)) :]}
    gained = [event for event in added if event.id in kept]
    lost = [event for event in pushed if event.id not in kept]
    total = change.before + len(added)
    outside = max(total - limit, 0)  # the earliest of the log, which are in no table
    return gained, lost + removed[outside:]
