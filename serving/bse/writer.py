"""Writes events and everything that follows from them, as the plan in the store says."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from hashtab.serving.bse.applying import Outcome, apply, expire
from hashtab.serving.bse.model import Model
from hashtab.serving.errors import BundleError
from hashtab.serving.store import (
    HEARTBEAT,
    PLAN,
    Change,
    Event,
    KeptModel,
    Plan,
    TableStore,
    User,
)

Result = TypeVar("Result")


class Writer:
    """One of any number of writers of a store; safe between threads.

    Args:
        store: open for writing.
    """

    def __init__(self, store: TableStore) -> None:
        self.store = store
        self._opened: dict[str, Model] = {}  # replaced as a whole: other threads read it
        self._opening = threading.Lock()

    def write(
        self, events: Sequence[Event], offsets: Mapping[str, bytes] | None = None
    ) -> list[Outcome]:
        """Write events, durably, and return what became of each.

        Args:
            events: in any order, with duplicates.
            offsets: how far their sources are read with these, written in the same change.

        Raises:
            StoreError: if the store cannot be written; the same events may be written again.
            BundleError: if a model of the plan cannot be opened here.
        """
        now = microseconds()

        def work(change: Change, plan: Plan, models: dict[bytes, Model]) -> list[Outcome]:
            outcomes = apply(change, events, models, plan, now)
            for name, offset in (offsets or {}).items():
                change.put_value(name, offset)
            change.put_value(HEARTBEAT, str(now).encode())
            return outcomes

        return self.change(_users(events), work)

    def expire(self, users: Sequence[User]) -> int:
        """Take out of log and tables what the plan keeps no longer; return how many events."""
        now = microseconds()
        return self.change(
            users, lambda change, plan, models: expire(change, users, models, plan, now)
        )

    def beat(self) -> None:
        """Say that all that was accepted is in the tables."""
        self.store.change(
            [], lambda change: change.put_value(HEARTBEAT, str(microseconds()).encode())
        )

    def change(
        self,
        users: Sequence[User],
        work: Callable[[Change, Plan, dict[bytes, Model]], Result],
    ) -> Result:
        """Change the store by the plan that it has at that moment, and with its models."""
        while True:
            try:
                return self.store.change(users, lambda change: self._planned(change, work))
            except _NotOpenedError as missing:
                # Outside of the transaction, which other writers wait for.
                self._open(missing.plan)

    def plan(self, work: Callable[[Plan], Plan]) -> Plan:
        """Change the plan that all writers follow; return it."""

        def planned(change: Change) -> Plan:
            plan = work(Plan.from_bytes(change.value(PLAN)))
            change.put_value(PLAN, plan.to_bytes())
            return plan

        return self.store.change([], planned)

    def models(self, plan: Plan) -> dict[bytes, Model]:
        """Return the models of a plan whose tables are kept, opened, by fingerprint.

        Raises:
            BundleError: if one of them cannot be opened here.
        """
        opened = self._open(plan)
        return {bytes.fromhex(name): opened[k.digest] for name, k in _kept(plan).items()}

    @property
    def text_users(self) -> bool | None:
        """Whether the models know users as text; None where none is open."""
        return next((model.text_users for model in self._opened.values()), None)

    def _planned(
        self, change: Change, work: Callable[[Change, Plan, dict[bytes, Model]], Result]
    ) -> Result:
        plan = Plan.from_bytes(change.value(PLAN))
        opened, kept = self._opened, _kept(plan)
        if not all(model.digest in opened for model in kept.values()):
            raise _NotOpenedError(plan)
        return work(
            change, plan, {bytes.fromhex(name): opened[k.digest] for name, k in kept.items()}
        )

    def _open(self, plan: Plan) -> dict[str, Model]:
        """Open the models of a plan, and let go of others."""
        with self._opening:
            opened = {}
            for name, kept in _kept(plan).items():
                opened[kept.digest] = self._opened.get(kept.digest) or _opened(name, kept)
            self._opened = opened
            return opened


def _kept(plan: Plan) -> dict[str, KeptModel]:
    """Return the models whose tables writers keep up to date."""
    return {name: kept for name, kept in plan.models.items() if kept.state != "dropping"}


def _opened(name: str, kept: KeptModel) -> Model:
    model = Model.open(kept.bundle)
    found = model.bundle.manifest
    if (found.digest, found.fingerprint) != (kept.digest, name):
        raise BundleError(
            f"{kept.bundle} holds the bundle {found.digest[:12]}, its tables are kept for "
            f"{kept.digest[:12]}: leave a bundle in its place, the same on every machine"
        )
    return model


class _NotOpenedError(Exception):
    """A plan names a model that this writer has not opened yet."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("the plan names a model that is not open")
        self.plan = plan


def microseconds() -> int:
    """Return the time now, microseconds since 1970 UTC."""
    return time.time_ns() // 1000


def _users(events: Sequence[Event]) -> list[User]:
    return list({event.user: None for event in events})
