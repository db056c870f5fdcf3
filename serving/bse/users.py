"""What is kept of one user: shown, and forgotten."""

import numpy as np

from hashtab.serving.bse.applying import NOTHING
from hashtab.serving.bse.messages import EventOut, ForgottenOut, TableOut, UserOut, iso
from hashtab.serving.bse.model import Model
from hashtab.serving.store import PLAN, Change, Plan, TableStore, User, unpack

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
    watermark = iso(head.watermark) if head.watermark > NOTHING.watermark else None
    return UserOut(user, head.events, watermark, tables, recent)


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
    before = store.fingerprints()

    def forgotten(change: Change) -> ForgottenOut | None:
        # A model may have come meanwhile.
        kept = map(bytes.fromhex, Plan.from_bytes(change.value(PLAN)).models)
        fingerprints = {*before, *kept}
        (head,) = change.heads([user])
        tables = [f for f in fingerprints if change.records(f, [user])[0] is not None]
        change.forget(user)
        for fingerprint in fingerprints:
            change.put_records(fingerprint, {user: None})
        if head is None and not tables:
            return None
        return ForgottenOut(events=head.events if head else 0, tables=len(tables))

    return store.change([user], forgotten)
