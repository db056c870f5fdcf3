"""What a scorer reads of the event log; no score depends on it."""

import asyncio

from hashtab.serving.scorer.tables import Tables
from hashtab.serving.store import Event, StoreError, User

_PATIENCE_S = 0.2  # of a request; others may wait for their turn meanwhile


async def events_of(tables: Tables, user: User, last: int | None = None) -> list[Event] | None:
    """Return a user's events in order; None where the store cannot be read soon.

    Args:
        tables: whose store keeps the log.
        user: as the store knows users.
        last: so many of the latest; all by default.
    """
    if tables.problem is not None:
        return None
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await asyncio.to_thread(_read, tables, user, last)
    except (TimeoutError, StoreError):
        return None


def _read(tables: Tables, user: User, last: int | None) -> list[Event]:
    with tables.patient() as store:
        return store.events(user, last)
