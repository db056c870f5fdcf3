"""Tables of a new model: built from the log in the background while those of the old one serve."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from hashtab.serving.bse.applying import from_log
from hashtab.serving.bse.model import Model
from hashtab.serving.bse.writer import Writer, microseconds
from hashtab.serving.store import Change, Event, Head, KeptModel, Plan, StoreError, User

_log = logging.getLogger(__name__)

_USERS_AT_ONCE = 64


def add_model(writer: Writer, folder: str | Path) -> tuple[bytes, KeptModel]:
    """Put a model into the plan: from now on all writers keep its tables; returns it.

    It is building until every user of the log has a table. A model that is kept already stays as
    it is, or, where it was retiring, is live again in place of the one that is live now.

    Raises:
        BundleError: if the bundle cannot be used.
        StoreError: if the store holds tables of this model that are not from its log, or its users
            are of another type than those of the other models.
    """
    model = Model.open(folder)
    _check_fits(writer, model)

    def added(plan: Plan) -> Plan:
        known = plan.models.get(model.fingerprint.hex())
        kept = KeptModel(
            bundle=str(Path(folder).resolve()),
            digest=model.bundle.manifest.digest,
            state="building" if known is None else known.state,
            since=microseconds() if known is None else known.since,
        )
        plan = plan.with_model(model.fingerprint, kept)
        return _cut_over(plan, model.fingerprint) if kept.state == "retiring" else plan

    plan = writer.plan(added)
    return model.fingerprint, plan.models[model.fingerprint.hex()]


def _check_fits(writer: Writer, model: Model) -> None:
    plan = writer.store.plan()
    for other in writer.models(plan).values():
        if other.text_users != model.text_users:
            raise StoreError(
                f"users of {model.bundle.folder} are {_kind(model)}, those of the models whose "
                f"tables are kept are {_kind(other)}: give this one a store of its own"
            )
    if model.fingerprint.hex() in plan.models:
        return
    if next(writer.store.users(model.fingerprint), None) is not None:
        raise StoreError(
            f"{writer.store.name} holds tables of fingerprint {model.fingerprint.hex()} that were "
            "not built from its event log: name another store, or drop them with python -m "
            "hashtab.serving.store drop and replay the histories into the log"
        )


def _kind(model: Model) -> str:
    return "text" if model.text_users else "whole numbers"


def build(
    writer: Writer, fingerprint: bytes, progress: Callable[[int], None], go_on: Callable[[], bool]
) -> bool:
    """Give every user of the log a table of a model, and make the model live.

    Begun again after a kill, it does what is left.

    Args:
        writer: of the store.
        fingerprint: of a model that is building.
        progress: is told how many users have been looked at.
        go_on: is asked between two changes; False ends the work where it is.

    Returns:
        Whether it came to the end.
    """
    plan = writer.store.plan()
    if fingerprint.hex() not in plan.models:
        return False
    model = writer.models(plan)[fingerprint]
    done = 0
    for users in _pages(writer.store.logged_users()):
        if not go_on():
            return False
        _build_users(writer, model, users)
        done += len(users)
        progress(done)
    writer.plan(lambda plan: _cut_over(plan, fingerprint))
    return True


def _build_users(writer: Writer, model: Model, users: list[User]) -> None:
    """Give users a table; what is read and computed is written if it still holds then."""
    while users:
        seen: dict[User, Head] = {}
        records: dict[User, bytes | None] = {}
        for user in users:
            head, events, there = _read(writer, model, user)
            if head is not None and not there:
                seen[user], records[user] = head, from_log(model, user, events, head)
        users = writer.store.change(list(seen), lambda c, s=seen, r=records: _put(c, model, s, r))  # type: ignore[misc]


def _read(writer: Writer, model: Model, user: User) -> tuple[Head | None, list[Event], bool]:
    with writer.store.reading() as log:
        (head,) = log.heads([user])  # first: where events come meanwhile, it is not the same later
        (record,) = log.records(model.fingerprint, [user])
        there = record is not None
        return head, [] if there or head is None else log.events(user), there


def _put(
    change: Change, model: Model, seen: dict[User, Head], records: dict[User, bytes | None]
) -> list[User]:
    """Write records of users whose log is as it was; return the other users."""
    users = list(seen)
    heads = dict(zip(users, change.heads(users), strict=True))
    there = change.records(model.fingerprint, users)
    free = {user for user, record in zip(users, there, strict=True) if record is None}
    same = [user for user in users if heads[user] == seen[user] and user in free]
    change.put_records(model.fingerprint, {user: records[user] for user in same})
    for user in same:
        # A writer who has just read that there is no record must meet a change, and look again.
        change.put_head(user, seen[user])
    return [user for user in users if user in free and heads[user] not in (seen[user], None)]


def _cut_over(plan: Plan, fingerprint: bytes) -> Plan:
    """Make a model live, and let those retire that were."""
    now = microseconds()
    if fingerprint.hex() not in plan.models:
        return plan
    models = {
        name: replace(kept, state="retiring", since=now) if kept.state == "live" else kept
        for name, kept in plan.models.items()
    }
    models[fingerprint.hex()] = replace(models[fingerprint.hex()], state="live", since=now)
    return replace(plan, models=models)


def retire(writer: Writer, keep_us: int) -> list[bytes]:
    """Drop the tables of models that have been retiring for longer; return their fingerprints."""
    limit = microseconds() - keep_us
    gone = [
        bytes.fromhex(name)
        for name, kept in writer.store.plan().models.items()
        if kept.state == "retiring" and kept.since < limit
    ]
    for fingerprint in gone:
        # First out of the plan: nobody writes what is about to be dropped.
        writer.plan(lambda plan, f=fingerprint: _without(plan, f))  # type: ignore[misc]
        dropped = writer.store.drop(fingerprint)
        _log.info("dropped %d tables of fingerprint %s", dropped, fingerprint.hex())
    return gone


def _without(plan: Plan, fingerprint: bytes) -> Plan:
    kept = plan.models.get(fingerprint.hex())
    return plan.with_model(fingerprint, None) if kept and kept.state == "retiring" else plan


def _pages(users: Iterable[User]) -> Iterator[list[User]]:
    users = iter(users)
    while page := list(islice(users, _USERS_AT_ONCE)):
        yield page
