"""Work that only one of several writers should do at a time, though two of them do no harm."""

import uuid

from hashtab.serving.bse.writer import microseconds
from hashtab.serving.store import Change, TableStore

SECONDS = 30.0


class Lease:
    """The right to do one kind of work, for some seconds, unless it is taken again.

    Args:
        store: of the log.
        work: its name.
    """

    def __init__(self, store: TableStore, work: str) -> None:
        self._store = store
        self._name = f"lease {work}"
        self._mine = uuid.uuid4().hex

    def take(self) -> bool:
        """Take the lease, or keep it; False where another writer has it."""
        return self._store.change([], self._taken, [self._name])

    def give(self) -> None:
        """Give the lease back, so that another writer need not wait."""

        def given(change: Change) -> None:
            if (change.value(self._name) or b"").decode().partition(" ")[0] == self._mine:
                change.put_value(self._name, None)

        self._store.change([], given, [self._name])

    def _taken(self, change: Change) -> bool:
        owner, _, until = (change.value(self._name) or b"").decode().partition(" ")
        now = microseconds()
        if owner not in ("", self._mine) and int(until) > now:
            return False
        change.put_value(self._name, f"{self._mine} {now + int(SECONDS * 1e6)}".encode())
        return True
