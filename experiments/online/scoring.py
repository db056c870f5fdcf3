"""What a score costs: 500 candidates over HTTP, and the same behind histories of any length."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from experiments.online.bench import NAIVE, PATHS, SCORER, Bench, say, send
from experiments.online.client import Load, Measured, request
from experiments.online.inputs import add_users, own_user, score_body
from experiments.online.report import Cell, Figures
from experiments.online.servers import Server
from hashtab.serving.store import User

CONNECTIONS = (1, 4)
LENGTHS = (100, 1_000, 10_000, 100_000)
_NOTHING = "client against a server that does nothing"
_OWN = 10**6  # numbers of users that only this part has


@dataclass(kw_only=True)
class _Rounds:
    """Answers and costs of the rounds of one server under one load."""

    measured: list[Measured] = field(default_factory=list)
    cpu_s: float = 0.0

    def add(self, server: Server, load: Load) -> None:
        begin = server.cpu_s()
        self.measured.append(send(load))
        self.cpu_s += server.cpu_s() - begin

    def of(self, percent: float) -> float:
        """Return a percentile of the latencies of all rounds in milliseconds."""
        latencies = [m.latencies[m.good] for m in self.measured]
        return float(np.percentile(np.concatenate(latencies), percent)) * 1e3

    def row(self) -> dict[str, Cell]:
        answered = sum(int(m.good.sum()) for m in self.measured)
        sent = sum(len(m.statuses) for m in self.measured)
        cpu_ms = self.cpu_s / sent * 1e3
        return {
            "p50 ms": self.of(50),
            "p90 ms": self.of(90),
            "p99 ms": self.of(99),
            "requests/s": float(np.median([m.rate for m in self.measured])),
            "server CPU ms": cpu_ms,
            "requests/s and core": 1e3 / cpu_ms,
            "client CPU ms": sum(m.client_cpu_s for m in self.measured) / sent * 1e3,
            "not answered well": sent - answered,
        }


def scoring(bench: Bench) -> Figures:
    """Measure scorer and rival in turn, and the client against a server that does nothing."""
    bench.add_tables()
    rounds = {(name, c): _Rounds() for c in CONNECTIONS for name in (SCORER, NAIVE, _NOTHING)}
    with ExitStack() as running:
        servers = {name: running.enter_context(bench.server(name)) for name in (SCORER, NAIVE)}
        asked = {name: bench.requests(name) for name in servers}
        size = len(servers[SCORER].ask_raw(asked[SCORER][0])[1])
        servers[_NOTHING] = running.enter_context(bench.nothing(size))
        asked[_NOTHING] = asked[SCORER]
        for number in range(bench.rounds):
            for (name, connections), found in rounds.items():
                say(f"scoring, round {number + 1} of {bench.rounds}: {name}, c={connections}")
                load = Load(
                    address=servers[name].address,
                    requests=asked[name],
                    connections=connections,
                    seconds=bench.seconds,
                )
                found.add(servers[name], load)
    rows = [
        {"server": name, "connections": connections, **found.row()}
        for (name, connections), found in rounds.items()
    ]
    rows += [_ratio(rounds, connections) for connections in CONNECTIONS]
    return Figures(
        title=f"{bench.candidates} candidates over HTTP, one server process",
        notes=[
            f"{len(asked[SCORER][0]):,} bytes asked, {size:,} answered; items by id, one context "
            f"for all; {bench.users:,} users, drawn at random",
            f"{bench.rounds} rounds of {bench.seconds:g} s in turn: percentiles over all, requests "
            "a second the median; CPU from /proc, requests a second and core = 1,000 / CPU ms",
            "the client waits for each answer before it asks again on that connection",
        ],
        rows=rows,
    )


def _ratio(rounds: Mapping[tuple[str, int], _Rounds], connections: int) -> dict[str, Cell]:
    ours, naive = (rounds[name, connections].row() for name in (SCORER, NAIVE))
    row: dict[str, Cell] = {"server": f"{SCORER} / {NAIVE}", "connections": connections}
    for column, value in ours.items():
        rival = naive[column]
        assert not isinstance(value, str)
        assert not isinstance(rival, str)
        row[column] = "" if column.startswith(("client", "not")) else value / rival
    return row


def history(bench: Bench) -> Figures:
    """Ask for users with histories of each length in turn, so that all meet the same moments."""
    users: dict[User, int] = {own_user(bench.bundle, _OWN + n): n for n in LENGTHS}
    say(f"history: records of {', '.join(f'{n:,}' for n in LENGTHS)} behaviours")
    add_users(bench.bundle, bench.store, users)
    rows: list[dict[str, Cell]] = []
    for name in (SCORER, NAIVE):
        say(f"history: {name}")
        with bench.server(name) as server:
            bodies = [
                score_body(bench.bundle, user, bench.candidates, np.random.default_rng(7))
                for user in users
            ]
            asked = [request("POST", PATHS[name], body) for body in bodies]
            seconds = bench.seconds * bench.rounds
            measured = send(Load(address=server.address, requests=asked, seconds=seconds))
        rows += _by_length(name, measured)
    limit = bench.bundle.manifest.history_limit
    return Figures(
        title=f"{bench.candidates} candidates by length of the history, c=1",
        notes=[
            f"the table holds the latest {limit:,} behaviours" if limit else "no history limit",
            "counters hold all of a history; its items are drawn evenly from the catalogue, so "
            "that long ones have nearly as many different items as they can",
        ],
        rows=rows,
    )


def _by_length(name: str, measured: Measured) -> list[dict[str, Cell]]:
    # One connection: answers come in the order of the requests, which go round the lengths.
    number = np.arange(len(measured.statuses)) % len(LENGTHS)
    first = measured.milliseconds(50, measured.good & (number == 0))
    rows: list[dict[str, Cell]] = []
    for i, length in enumerate(LENGTHS):
        mine = measured.good & (number == i)
        p50 = measured.milliseconds(50, mine)
        rows.append(
            {
                "server": name,
                "behaviours": length,
                "p50 ms": p50,
                "p99 ms": measured.milliseconds(99, mine),
                "p50 / that of the first": p50 / first,
                "not answered well": int((~measured.good & (number == i)).sum()),
            }
        )
    return rows
