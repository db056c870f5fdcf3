"""What the service does in the background: builds, expiry, old tables, and the heartbeat."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import islice

from hashtab.serving.bse import metrics
from hashtab.serving.bse.building import build, retire
from hashtab.serving.bse.lease import Lease
from hashtab.serving.bse.writer import Writer, microseconds
from hashtab.serving.store import Plan, User

_log = logging.getLogger(__name__)

_BEAT_S = 1.0
_SWEEP_S = 30.0
_SILENT_S = 5.0
_USERS_AT_ONCE = 256


class Keeper:
    """A thread that looks after the store beside those that write events.

    Args:
        writer: of the store.
        keep_old_s: seconds that tables of a retiring model stay.
    """

    def __init__(self, writer: Writer, keep_old_s: float) -> None:
        self._writer = writer
        self._keep_us = round(keep_old_s * 1e6)
        self._lease = Lease(writer.store, "keeping")
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._swept = self._renewed = 0
        self._beaten = time.monotonic()
        self._failing: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    @property
    def failing(self) -> str | None:
        """Why the store cannot be written now; None if it can, and was a moment ago."""
        if "heartbeat" in self._failing:
            return self._failing["heartbeat"]
        silent_s = time.monotonic() - self._beaten
        return f"the store has not answered for {silent_s:.0f} s" if silent_s > _SILENT_S else None

    def wake(self) -> None:
        """Look at once whether there is something to do."""
        self._woken.set()

    def stop(self) -> None:
        """End, where a build is under way between two of its changes."""
        self._stopping.set()
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._try("heartbeat", self._beat)
            self._try("keeping", self._keep)
            self._woken.wait(_BEAT_S)
            self._woken.clear()
        self._try("keeping", self._lease.give)

    def _beat(self) -> None:
        self._writer.beat()
        self._beaten = time.monotonic()

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
            self._failing.pop(name, None)
        except Exception as error:  # the store may be away, a disk full: it is tried again
            self._failing[name] = str(error)
            metrics.FAILURES.labels(name.partition(" ")[0]).inc()
            _log.warning("%s failed and is tried again: %s", name, error)

    def _keep(self) -> None:
        plan = self._writer.store.plan()
        for state in ("building", "live", "retiring"):
            count = sum(kept.state == state for kept in plan.models.values())
            metrics.MODELS.labels(state).set(count)
        if not self._lease.take():
            return
        for name, kept in plan.models.items():
            if kept.state == "building":
                self._try(f"build of {name}", partial(self._build, bytes.fromhex(name)))
        retire(self._writer, self._keep_us, self._goes_on)
        if microseconds() - self._swept > _SWEEP_S * 1e6:
            self.sweep(plan)
            self._swept = microseconds()

    def _build(self, fingerprint: bytes) -> None:
        _log.info("building the tables of fingerprint %s", fingerprint.hex())
        if build(self._writer, fingerprint, metrics.BUILT_USERS.set, self._goes_on):
            _log.info("tables of fingerprint %s are live", fingerprint.hex())

    def _goes_on(self) -> bool:
        if self._stopping.is_set():
            return False
        if microseconds() - self._renewed > _BEAT_S * 1e6:
            self._renewed = microseconds()
            self._beat()  # long work must not look like a service that is gone
            return self._lease.take()
        return True

    def sweep(self, plan: Plan) -> None:
        """Take out of log and tables what the plan keeps no longer, of users without new events."""
        if plan.window_us is None and plan.count is None:
            return
        users = self._writer.store.logged_users()
        while page := list(islice(users, _USERS_AT_ONCE)):
            if outdated := self._outdated(page, plan):
                metrics.EXPIRED.inc(self._writer.expire(outdated))
            if not self._goes_on():
                return

    def _outdated(self, users: list[User], plan: Plan) -> list[User]:
        with self._writer.store.reading() as log:
            heads = log.heads(users)
        horizon = microseconds() - (plan.window_us or microseconds())
        return [
            user
            for user, head in zip(users, heads, strict=True)
            if head is not None
            and head.events
            and (head.earliest < horizon or head.events > (plan.count or head.events))
        ]
