"""Swap models under load: new planes, new tables, and no answer that mixes two of them."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.online.bench import say
from experiments.online.client import Load, Measured, drive, in_own_process, request
from experiments.online.inputs import Events, offline_scores, own_user, score_bodies
from experiments.online.report import Cell, Figures
from experiments.online.servers import Server, serving
from hashtab.serving.bse.messages import EventIn, to_events
from hashtab.serving.bse.model import Model
from hashtab.serving.bse.record_change import built
from hashtab.serving.store import Head, User

SHARE = 0.7  # of the capacity
TOLERANCE = 1e-6
_BEHAVIOURS, _USERS, _CANDIDATES = 60, 50, 50
_POST = 500  # events
_KEEP_OLD_S = 3.0
_SETTLE_S = 0.05
_PATIENCE_S = 60.0
_BEGIN_US, _SECOND_US = 1_700_000_000_000_000, 1_000_000

Expected = dict[str, list[list[float]]]
"""Digest of a bundle -> scores of each request by that bundle and its tables."""


@dataclass(kw_only=True)
class Checked:
    """What answers were, held against what the model that they name must say.

    Args:
        by_model: answers by digest.
        wrong: answers whose scores are not those of the model that they name.
        without_table: answers without the user's table.
        largest: difference between two scores.
        examples: of what was wrong.
    """

    by_model: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    without_table: int = 0
    largest: float = 0.0
    examples: list[str] = field(default_factory=list)

    def look(self, expected: Expected, number: int, status: int, body: bytes) -> None:
        """Take in one answer."""
        if status != 200:
            self.examples = [*self.examples, f"{status}: {body.decode()}"][:3]
            return
        answer: dict[str, Any] = json.loads(body)
        digest = answer["model"]["digest"]
        self.by_model[digest] += 1
        self.without_table += answer["history"] != "table" or answer["degraded"] is not None
        wanted, found = np.array(expected[digest][number]), np.array(answer["scores"])
        difference = float(np.abs(wanted - found).max())
        self.largest = max(self.largest, difference)
        if difference > TOLERANCE:
            self.wrong += 1
            self.examples = [*self.examples, f"request {number}, {digest[:12]}"][:3]

    def add(self, other: "Checked") -> None:
        """Add what another load came to."""
        self.by_model += other.by_model
        self.wrong += other.wrong
        self.without_table += other.without_table
        self.largest = max(self.largest, other.largest)
        self.examples = (self.examples + other.examples)[:3]


def checked(load: Load, expected: Expected) -> tuple[Measured, Checked]:
    """Send a load and check each answer."""
    found = Checked()
    return drive(load, lambda *answer: found.look(expected, *answer)), found


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run of swaps.

    Args:
        bundles: folders of models with planes of their own, on one catalogue; swapped in turn.
        work: empty folder.
        swaps: to make.
        every_s: seconds between two swaps.
        seconds: of each load; load follows load until the swaps are made.
    """

    bundles: Sequence[Path]
    work: Path
    swaps: int
    every_s: float
    seconds: float

    def bse(self) -> Any:
        """Run the BSE service, which keeps the first model."""
        options = [f"--keep-old-s={_KEEP_OLD_S}", *self._places]
        return serving(["-m", "hashtab.serving.bse", *options], self.work / "bse.log")

    def scorer(self) -> Any:
        """Run the scorer, which serves the first model."""
        return serving(["-m", "hashtab.serving.scorer", *self._places], self.work / "scorer.log")

    @property
    def _places(self) -> list[str]:
        return [f"--bundle={self.bundles[0]}", f"--store={self.work / 'store'}"]


def swap(plan: Plan) -> tuple[Figures, Checked, int]:
    """Swap models under load; return the figures, what the answers were, and failed requests."""
    models = [Model.open(folder) for folder in plan.bundles]
    first = models[0].bundle
    users = [own_user(first, i) for i in range(_USERS)]
    bodies = score_bodies(first, users, _CANDIDATES)
    events = _events(models[0], users)
    expected = _expected(models, users, events, bodies)
    asked = [request("POST", "/v1/score", body) for body in bodies]
    with plan.bse() as bse:
        _post(bse, events)
        _wait_until_live(bse, models[0].fingerprint.hex())
        with plan.scorer() as scorer, in_own_process() as process:
            load = Load(address=scorer.address, requests=asked, connections=4, seconds=plan.seconds)
            capacity = process.submit(drive, load).result().rate
            say(f"swaps: {plan.swaps} at {SHARE:.0%} of {capacity:.0f} requests/s")
            steady = Load(
                address=scorer.address,
                requests=asked,
                connections=16,
                seconds=plan.seconds,
                rate=SHARE * capacity,
            )
            loads, total = list[Measured](), Checked()
            with ThreadPoolExecutor(1) as swapper:
                swapping = swapper.submit(_swap_all, plan, models, bse, scorer)
                while not swapping.done():
                    measured, found = process.submit(checked, steady, expected).result()
                    loads.append(measured)
                    total.add(found)
                taken = swapping.result()
    failed = sum(int((~measured.good).sum()) for measured in loads)
    return _figures(plan, loads, total, taken), total, failed


def _events(model: Model, users: Sequence[User]) -> list[dict[str, Any]]:
    events = Events(model.bundle, "swap")
    moments = range(_BEGIN_US, _BEGIN_US + _BEHAVIOURS * _SECOND_US, _SECOND_US)
    return [events.make(user, moment) for user in users for moment in moments]


def _expected(
    models: Sequence[Model],
    users: Sequence[User],
    events: Sequence[dict[str, Any]],
    bodies: Sequence[dict[str, Any]],
) -> Expected:
    logged = to_events([EventIn(**event) for event in events], None)
    expected: Expected = {}
    for number, model in enumerate(models):
        say(f"swaps: offline scores of model {number + 1} of {len(models)}")
        of_user = {user: [e for e in logged if e.user == user] for user in users}
        records = {
            user: built(model, past, Head(events=len(past))) for user, past in of_user.items()
        }
        expected[model.bundle.manifest.digest] = [
            offline_scores(model.bundle, records[body["user"]], body) for body in bodies
        ]
    return expected


def _post(bse: Server, events: Sequence[dict[str, Any]]) -> None:
    for start in range(0, len(events), _POST):
        _must(bse, "POST", "/v1/events", {"events": list(events[start : start + _POST])})


def _must(server: Server, method: str, path: str, body: object = None) -> Any:
    status, answer = server.ask(method, path, body)
    if status != 200:
        raise SystemExit(f"error: {method} {path} was answered {status}: {answer.decode()}")
    return json.loads(answer or b"null")


def _swap_all(plan: Plan, models: Sequence[Model], bse: Server, scorer: Server) -> list[float]:
    """Swap in turn; return the seconds that each took from the new model to its first score."""
    taken = []
    for number in range(1, plan.swaps + 1):
        time.sleep(plan.every_s)
        model = models[number % len(models)]
        begin = time.monotonic()
        folder = str(model.bundle.folder)
        _must(bse, "POST", "/v1/models", {"bundle": folder})
        _wait_until_live(bse, model.fingerprint.hex())
        _load(scorer, folder, model.bundle.manifest.digest)
        taken.append(time.monotonic() - begin)
        if number % 10 == 0:
            say(f"swaps: {number} of {plan.swaps}")
    return taken


def _wait_until_live(bse: Server, fingerprint: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        models = _must(bse, "GET", "/v1/models")["models"]
        if any(m["fingerprint"] == fingerprint and m["state"] == "live" for m in models):
            return
        time.sleep(_SETTLE_S)
    raise SystemExit(f"error: the tables of {fingerprint} do not become live")


def _load(scorer: Server, folder: str, digest: str) -> None:
    """Have a model served, whose tables are there."""
    served = _must(scorer, "POST", "/v2/repository/models/hashtab/load", {"bundle": folder})
    if served["digest"] != digest:
        raise SystemExit(f"error: {folder} was to be served, but {served} is")


def _figures(
    plan: Plan, loads: Sequence[Measured], found: Checked, taken: Sequence[float]
) -> Figures:
    sent = sum(len(measured.statuses) for measured in loads)
    latencies = np.concatenate([measured.latencies for measured in loads])
    row: dict[str, Cell] = {
        "swaps": len(taken),
        "requests": sent,
        "requests/s": sent / sum(measured.wall_s for measured in loads),
        "failed": sent - found.by_model.total(),
        "of mixed versions": found.wrong,
        "without table": found.without_table,
        "largest difference": found.largest,
        "p50 ms": float(np.percentile(latencies, 50)) * 1e3,
        "p99 ms": float(np.percentile(latencies, 99)) * 1e3,
        "s a swap": float(np.median(taken)),
    }
    return Figures(
        title=f"{len(taken)} swaps of model, planes and tables at {SHARE:.0%} load",
        notes=[
            f"{len(plan.bundles)} models with planes of their own, in turn; for each swap the BSE "
            f"service builds the tables of {_USERS} users with {_BEHAVIOURS} behaviours from its "
            "log, and drops them when they have been out of use for "
            f"{_KEEP_OLD_S:g} s; then the scorer loads the bundle",
            f"each answer of {_CANDIDATES} candidates must be that of the model that it names, "
            f"computed offline from that model's own tables, within {TOLERANCE:g}",
            f"answers by model: {', '.join(map(str, found.by_model.values()))}",
            *(f"wrong: {example}" for example in found.examples),
        ],
        rows=[row],
    )
