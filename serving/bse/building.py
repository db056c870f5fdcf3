"""Tables of a new model: built from the log in the background while those of the old one serve."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from hashtab.serving.bse.applying import from_log
from hashtab.serving.bse.model import Model
from hashtab.serving.bse.writer import Writer, microseconds
from hashtab.serving.manifest import BundleManifest
from hashtab.serving.store import Change, Event, Head, KeptModel, Plan, StoreError, User

_log = logging.getLogger(__name__)

_USERS_AT_ONCE = 64


def add_model(writer: Writer, folder: str | Path) -> tuple[bytes, KeptModel]:
    """Put a model into the plan: all writers keep its tables, and it is to be live; returns it.

    It is building until every user of the log has a table, and takes the place of the model that
    is live then. One that is retiring has all its tables still, and takes that place at once. A
    model whose build is under way for nothing is dropped.

    Raises:
        BundleError: if the bundle cannot be used.
        StoreError: if the store holds tables of this model that are not from its log, or its old
            ones are just being dropped, or its users are of another type than those of the others.
    """
    model = Model.open(folder)
    _check_fits(writer, model)

    def added(plan: Plan) -> Plan:
        known = plan.models.get(model.fingerprint.hex())
        if known is not None and known.state == "dropping":
            raise StoreError(
                f"the old tables of fingerprint {model.fingerprint.hex()} are being dropped: try "
                "again when they are gone"
            )
        kept = KeptModel(
            bundle=str(Path(folder).resolve()),
            digest=model.bundle.manifest.digest,
            state="building" if known is None else known.state,
            since=microseconds() if known is None else known.since,
        )
        plan = _drop_builds(plan, but=model.fingerprint.hex())
        plan = replace(plan.with_model(model.fingerprint, kept), wanted=model.fingerprint.hex())
        return _cut_over(plan, model.fingerprint) if kept.state == "retiring" else plan

    plan = writer.plan(added)
    return model.fingerprint, plan.models[model.fingerprint.hex()]


def start_with(writer: Writer, folder: str | Path) -> None:
    """Add the model that a service is started with, unless the last start named the same.

    A process that is started again must not bring back what was replaced meanwhile.

    Raises:
        BundleError, StoreError: as `add_model`.
    """
    digest = BundleManifest.read(Path(folder)).digest
    if digest == writer.store.plan().named:
        _log.info("%s was named at the last start too; the plan of the store holds", folder)
        return
    add_model(writer, folder)
    writer.plan(lambda plan: replace(plan, named=digest))


def _drop_builds(plan: Plan, but: str) -> Plan:
    models = {
        name: replace(kept, state="dropping", since=microseconds())
        if kept.state == "building" and name != but
        else kept
        for name, kept in plan.models.items()
    }
    return replace(plan, models=models)


def _check_fits(writer: Writer, model: Model) -> None:
    plan = writer.store.plan()
    if model.fingerprint.hex() in plan.models:
        return
    for other in writer.models(plan).values():
        if other.text_users != model.text_users:
            raise StoreError(
                f"users of {model.bundle.folder} are {_kind(model)}, those of the models whose "
                f"tables are kept are {_kind(other)}: give this one a store of its own"
            )
    if next(writer.store.users(model.fingerprint), None) is not None:
        raise StoreError(
            f"{writer.store.name} holds tables of fingerprint {model.fingerprint.hex()} that were "
            "not built from its event log: name another store, or drop them with python -m "
            "hashtab.serving.store drop and replay the histories into the log"
        )


def _kind(model: Model) -> str:
    return "text" if model.text_users else "whole numbers"


def withdraw(writer: Writer, fingerprint: bytes) -> bool:
    """Keep a model's tables no longer, and have them dropped; False where they are not kept."""

    def withdrawn(plan: Plan) -> Plan:
        kept = plan.models.get(fingerprint.hex())
        if kept is None:
            return plan
        dropping = replace(kept, state="dropping", since=microseconds())
        wanted = None if plan.wanted == fingerprint.hex() else plan.wanted
        # Named at the next start, it is meant to come back.
        named = None if plan.named == kept.digest else plan.named
        return replace(plan.with_model(fingerprint, dropping), wanted=wanted, named=named)

    return fingerprint.hex() in writer.plan(withdrawn).models


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
    kept = plan.models.get(fingerprint.hex())
    if kept is None or kept.state != "building":
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
    """Make a model live if it is wanted, and let those retire that were; else let it retire."""
    now = microseconds()
    built = plan.models.get(fingerprint.hex())
    if built is None or built.state not in ("building", "retiring"):
        return plan
    if plan.wanted != fingerprint.hex():
        return plan.with_model(fingerprint, replace(built, state="retiring", since=now))
    models = {
        name: replace(kept, state="retiring", since=now) if kept.state == "live" else kept
        for name, kept in plan.models.items()
    }
    models[fingerprint.hex()] = replace(built, state="live", since=now)
    return replace(plan, models=models)


def retire(writer: Writer, keep_us: int, go_on: Callable[[], bool]) -> list[bytes]:
    """Drop the tables of models that have been retiring for longer; return their fingerprints.

    They stay in the plan until all are gone, so that whoever is killed meanwhile goes on with it.
    """
    limit = microseconds() - keep_us
    plan = writer.plan(lambda plan: _without_old(plan, limit))
    gone = [bytes.fromhex(name) for name, k in plan.models.items() if k.state == "dropping"]
    for fingerprint in gone:
        for users in _pages(writer.store.users(fingerprint)):
            if not go_on():
                return []
            writer.store.remove(fingerprint, users)
        writer.store.drop(fingerprint)  # and whatever is no user's
        writer.plan(lambda plan, f=fingerprint: plan.with_model(f, None))  # type: ignore[misc]
        _log.info("tables of fingerprint %s are dropped", fingerprint.hex())
    return gone


def _without_old(plan: Plan, limit: int) -> Plan:
    models = {
        name: replace(kept, state="dropping")
        if kept.state == "retiring" and kept.since < limit
        else kept
        for name, kept in plan.models.items()
    }
    return replace(plan, models=models)


def _pages(users: Iterable[User]) -> Iterator[list[User]]:
    users = iter(users)
    while page := list(islice(users, _USERS_AT_ONCE)):
        yield page
