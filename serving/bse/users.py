"""What is kept of one user: shown, and forgotten."""

import numpy as np

from hashtab.serving.bse.messages import EventOut, ForgottenOut, TableOut, UserOut, iso
from hashtab.serving.bse.model import Model
from hashtab.serving.store import Change, TableStore, User, unpack

RECENT = 20  # behaviours that are shown


def show(store: TableStore, models: dict[bytes, Model], user: User) -> UserOut | None:
    """Return what is kept of a user; None where nothing is."""
    with store.reading() as log:
        (head,) = log.heads([user])
        if head is None:
            return None
        events = log.events(user, RECENT)[::-1]
        tables = []
        for fingerprint, model in models.items():
            (data,) = log.records(fingerprint, [user])
            if data is not None:
                tables.append(_table(data, model))
    recent = [EventOut(e.id, e.item, iso(e.time), e.side) for e in events]
    return UserOut(user, head.events, iso(head.watermark), tables, recent)


def _table(data: bytes, model: Model) -> TableOut:
    record = unpack(data, model.layout)
    return TableOut(
        fingerprint=model.fingerprint.hex(),
        behaviours=record.behaviours,
        buckets_filled=int(np.any(record.table, axis=-1).sum()),
        buckets=model.layout.rows,
        bytes=len(data),
        revision=record.revision,
    )


def forget(store: TableStore, user: User) -> ForgottenOut | None:
    """Delete a user's events and every table, of whatever model; None where there was nothing."""
    fingerprints = store.fingerprints()

    def forgotten(change: Change) -> ForgottenOut | None:
        (head,) = change.heads([user])
        events = change.events(user)
        tables = [f for f in fingerprints if change.records(f, [user])[0] is not None]
        change.remove(events)
        change.put_head(user, None)
        for fingerprint in tables:
            change.put_records(fingerprint, {user: None})
        if head is None and not events and not tables:
            return None
        return ForgottenOut(events=len(events), tables=len(tables))

    return store.change([user], forgotten)
