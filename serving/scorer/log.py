"""What a scorer reads of the event log; no score depends on it."""

from hashtab.serving.scorer.tables import Tables
from hashtab.serving.store import Event, StoreError, User


def events_of(tables: Tables, user: User, last: int | None = None) -> list[Event] | None:
    """Return a user's events in order; None where the store cannot be read.

    Args:
        tables: whose store keeps the log.
        user: as the store knows users.
        last: so many of the latest; all by default.
    """
    try:
        with tables.patient() as store:
            return store.events(user, last)
    except StoreError:
        return None
