"""How soon a behaviour shows: from the POST of an event to the first score that sees it."""

import json
import select
import time
from dataclasses import dataclass, field

import numpy as np

from experiments.online.bench import Bench, say
from experiments.online.client import Connection, Load, Measured, drive, in_own_process, request
from experiments.online.inputs import Events, own_user, score_body
from experiments.online.report import Cell, Figures
from experiments.online.servers import Server
from hashtab.serving.store import User

EVENTS_PER_S, BATCH = 5_000, 50
_PROBES_PER_S, _PROBED, _CANDIDATES = 20, 100, 8
_HISTORY = 20  # behaviours that every user has before
_FILLING = 500  # events of a POST that fills the histories
_PAUSE_S = 0.0005  # between two looks at a score
_LONGEST_S = 10.0
_SECOND_US = 1_000_000


@dataclass(kw_only=True)
class _Seen:
    """What became of the probes, milliseconds each."""

    durable: list[float] = field(default_factory=list)  # POST to its answer
    visible: list[float] = field(default_factory=list)  # POST to the first score that sees it
    after: list[float] = field(default_factory=list)  # from the answer to that score
    refused: int = 0
    never: int = 0
    degraded: int = 0
    looks: int = 0


class _Prober:
    """Posts events of probed users, a batch each, and looks at the user's scores meanwhile."""

    def __init__(self, bench: Bench, bse: Server, scorer: Server, batch: int) -> None:
        self._post, self._look = Connection(bse.address), Connection(scorer.address)
        self._events, self._batch = Events(bench.bundle, "probe"), batch
        self._others = bench.known
        self._users = [own_user(bench.bundle, 2 * 10**6 + i) for i in range(_PROBED)]
        random = np.random.default_rng(3)
        bodies = [score_body(bench.bundle, user, _CANDIDATES, random) for user in self._users]
        self._items = [body["items"][0] for body in bodies]
        self._asked = [request("POST", "/v1/score", body) for body in bodies]
        self.seen = _Seen()

    @property
    def users(self) -> list[User]:
        """The users that are probed, and nobody else's."""
        return self._users

    def run(self, seconds: float) -> _Seen:
        """Probe user after user at even distances."""
        scores = [self._scores(asked) for asked in self._asked]
        begin = time.monotonic()
        for number in range(int(seconds * _PROBES_PER_S)):
            time.sleep(max(0.0, begin + number / _PROBES_PER_S - time.monotonic()))
            place = number % _PROBED
            scores[place] = self._probe(place, scores[place])
        self._post.close()
        self._look.close()
        return self.seen

    def _scores(self, asked: bytes) -> list[float]:
        status, body = self._look.ask(asked)
        return self._read(status, body)

    def _read(self, status: int, body: bytes) -> list[float]:
        answer = json.loads(body)
        if status != 200:
            raise SystemExit(f"error: the scorer answered {status}: {answer}")
        self.seen.looks += 1
        self.seen.degraded += answer["degraded"] is not None
        scores: list[float] = answer["scores"]
        return scores

    def _probe(self, place: int, before: list[float]) -> list[float]:
        """Post one batch and look until the scores change; return them."""
        now_us = time.time_ns() // 1000
        events = [self._events.make(self._users[place], now_us, self._items[place])]
        events += [self._events.make(user, now_us) for user in self._others[: self._batch - 1]]
        posted = request("POST", "/v1/events", {"events": events})
        sent = time.monotonic()
        self._post.send(posted)
        durable: float | None = None
        visible: float | None = None
        scores = before
        self._look.send(self._asked[place])
        while durable is None or visible is None:
            both = ((self._post, durable), (self._look, visible))
            waiting = [connection for connection, when in both if when is None]
            ready, _, _ = select.select(waiting, [], [], _LONGEST_S)
            now = time.monotonic()
            if not ready or now - sent > _LONGEST_S:
                self.seen.never += 1
                self._post.close()
                self._look.close()
                return self._scores(self._asked[place])
            if self._post in ready and self._post.receive():
                durable = now
                self.seen.refused += self._post.status != 200
            if self._look in ready and self._look.receive():
                scores = self._read(self._look.status, self._look.body)
                if scores != before:
                    visible = now
                else:
                    time.sleep(_PAUSE_S)
                    self._look.send(self._asked[place])
        self.seen.durable.append((durable - sent) * 1e3)
        self.seen.visible.append((visible - sent) * 1e3)
        self.seen.after.append((visible - durable) * 1e3)
        return scores


def freshness(bench: Bench, rate: int, batch: int, seconds: float) -> Figures:
    """Post events at a steady rate, a few of them probes, to the BSE, and ask the scorer."""
    if rate <= _PROBES_PER_S * batch:
        raise SystemExit(
            f"error: --events-per-s must be more than the {_PROBES_PER_S * batch} of the probes"
        )
    with bench.bse() as bse, bench.server("hashtab scorer") as scorer:
        prober = _Prober(bench, bse, scorer, batch)
        _fill(bench, bse, [*bench.known, *prober.users])
        say(f"freshness: {rate:,} events/s in POSTs of {batch} for {seconds:g} s")
        load = _background(bench, bse, rate - _PROBES_PER_S * batch, batch, seconds)
        cpu = bse.cpu_s()
        with in_own_process() as process:
            coming = process.submit(drive, load)
            seen = prober.run(seconds)
            background = coming.result()
        cpu = bse.cpu_s() - cpu
    posted = len(background.statuses) * batch + len(seen.visible) * batch
    return Figures(
        title=f"Event to score at {rate:,} events a second",
        notes=[
            f"{batch} events a POST; {len(bench.known):,} users with {_HISTORY} behaviours or "
            f"more, {_PROBED} others are probed, {_PROBES_PER_S} times a second in all",
            f"a probe's scores are asked for again {_PAUSE_S * 1e3:g} ms after each answer until "
            "they change; that is part of the figure",
            f"{seen.looks:,} scores asked, {seen.degraded} degraded; {seen.never} probes never "
            f"seen, {seen.refused} refused; POSTs beside the probes: {_counted(background)}",
            f"BSE: {posted / background.wall_s:,.0f} events/s answered, "
            f"{cpu / max(posted, 1) * 1e6:.0f} microseconds of CPU an event",
        ],
        rows=[
            _row("POST to durable answer", seen.durable),
            _row("POST to first score that sees it", seen.visible),
            _row("durable answer to that score", seen.after),
        ],
    )


def _row(what: str, values: list[float]) -> dict[str, Cell]:
    percents = np.percentile(values, [50, 90, 99, 100]).tolist() if values else [float("nan")] * 4
    names = ("p50 ms", "p90 ms", "p99 ms", "longest ms")
    return {"what": what, "probes": len(values), **dict(zip(names, percents, strict=True))}


def _counted(measured: Measured) -> str:
    counts = ", ".join(f"{n:,} x {status}" for status, n in measured.count().items())
    return f"{counts}, p99 {measured.milliseconds(99):.1f} ms"


def _fill(bench: Bench, bse: Server, users: list[User]) -> None:
    """Give every user a history, so that records are rewritten and not made."""
    say(f"freshness: {_HISTORY} behaviours for each of {len(users):,} users")
    events, begin = Events(bench.bundle, "fill"), time.time_ns() // 1000 - 3600 * _SECOND_US
    made = [events.make(user, begin + i * _SECOND_US) for i in range(_HISTORY) for user in users]
    for start in range(0, len(made), _FILLING):
        status, answer = bse.ask("POST", "/v1/events", {"events": made[start : start + _FILLING]})
        if status != 200:
            raise SystemExit(f"error: the BSE answered {status}: {answer.decode()}")


def _background(bench: Bench, bse: Server, rate: int, batch: int, seconds: float) -> Load:
    events, random = Events(bench.bundle, "load"), np.random.default_rng(5)
    count = int(rate * seconds) // batch + 1
    now_us = time.time_ns() // 1000
    posts = []
    for number in range(count):
        users = [bench.known[i] for i in random.integers(0, len(bench.known), batch)]
        at = now_us + int(number * batch / rate * _SECOND_US)
        posts.append(
            request("POST", "/v1/events", {"events": [events.make(user, at) for user in users]})
        )
    return Load(
        address=bse.address, requests=posts, connections=32, seconds=seconds, rate=rate / batch
    )
