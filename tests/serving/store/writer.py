"""A process that writes until it is killed: `python -m tests.serving.store.writer MODE URL [ID]`.

Each line that it prints is a number whose put has returned.
"""

import sys
from collections.abc import Callable
from itertools import count

from hashtab.serving.store import lmdb_store, open_store
from tests.serving.store.records import FINGERPRINT, numbered

BATCH = 5
RECORD = 256  # components a row, 32 kB a record: a put is many pages


def append(url: str) -> None:
    """Put five new users at a time, and note beside them which they were."""
    with open_store(url) as store:
        last = store.note(FINGERPRINT, "last")
        for batch in count(int(last) + 1 if last else 0):
            users = range(batch * BATCH, batch * BATCH + BATCH)
            records = {user: numbered(user, RECORD) for user in users}
            store.put(FINGERPRINT, records, {"last": b"%d" % batch})
            print(batch, flush=True)


def replace(url: str) -> None:
    """Put the same five users over and over, all with one revision."""
    with open_store(url) as store:
        for revision in count():
            record = numbered(revision, RECORD)
            store.put(FINGERPRINT, dict.fromkeys(range(BATCH), record))
            print(revision, flush=True)


def grow(url: str, number: str) -> None:
    """Put a hundred users of its own, from a map too small for ten."""
    lmdb_store.FIRST_MAP_BYTES = 1 << 18
    with open_store(url) as store:
        for user in range(100):
            store.put(FINGERPRINT, {f"{number} {user}": numbered(user, RECORD)})
            print(user, flush=True)


if __name__ == "__main__":
    modes: dict[str, Callable[..., None]] = {"append": append, "replace": replace, "grow": grow}
    modes[sys.argv[1]](*sys.argv[2:])
