"""What the parts of a measurement share: the bundle, a store of its own, the servers, progress."""

import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiments.online.client import Load, Measured, drive, in_own_process, request
from experiments.online.inputs import add_users, own_user, score_bodies
from experiments.online.servers import Server, serving
from hashtab.serving.bundle import Bundle
from hashtab.serving.store import User

SCORER, NAIVE = "hashtab scorer", "naive FastAPI"
PATHS = {SCORER: "/v1/score", NAIVE: "/score"}
_TYPICAL, _SPREAD, _LONGEST = 400, 1.0, 5000  # behaviours of a user, as at a grocer's


@dataclass(kw_only=True)
class Bench:
    """One measurement.

    Args:
        folder: of the bundle.
        work: empty folder for the store and logs.
        users: that are asked for, of no data set.
        candidates: of a request.
        seconds: of each load.
        rounds: that a load is repeated in turn with its rival's.
    """

    folder: Path
    work: Path
    users: int
    candidates: int
    seconds: float
    rounds: int
    known: list[User] = field(init=False)

    def __post_init__(self) -> None:
        self.bundle = Bundle.open(self.folder)
        self.store = str(self.work / "tables")
        self.known = [own_user(self.bundle, i) for i in range(self.users)]

    def add_tables(self) -> None:
        """Put records of the users into the store, as batch encoding would."""
        random = np.random.default_rng(0)
        drawn = random.lognormal(np.log(_TYPICAL), _SPREAD, self.users).clip(1, _LONGEST)
        say(f"making tables of {self.users:,} users")
        lengths = drawn.astype(int).tolist()
        add_users(self.bundle, self.store, dict(zip(self.known, lengths, strict=True)))

    def server(self, name: str) -> AbstractContextManager[Server]:
        """Run the scorer or its rival, one process, on the bundle and the store."""
        places = [f"--bundle={self.folder}", f"--store={self.store}"]
        if name == NAIVE:
            command, ready = ["experiments/naive_server.py", *places], "/openapi.json"
        else:
            command, ready = ["-m", "hashtab.serving.scorer", *places], "/health/ready"
        return serving(command, self.work / f"{name}.log", ready)

    def bse(self, *options: str) -> AbstractContextManager[Server]:
        """Run the BSE service on the bundle and the store."""
        places = [f"--bundle={self.folder}", f"--store={self.store}"]
        command = ["-m", "hashtab.serving.bse", *places, *options]
        return serving(command, self.work / "bse.log")

    def nothing(self, size: int) -> AbstractContextManager[Server]:
        """Run a server that answers so many bytes and does nothing else."""
        command = ["-m", "experiments.online.nothing", f"--size={size}"]
        return serving(command, self.work / "nothing.log", "/")

    def requests(self, name: str) -> list[bytes]:
        """Return different requests to score, of users drawn at random."""
        bodies = score_bodies(self.bundle, self.known, self.candidates)
        return [request("POST", PATHS[name], body) for body in bodies]

    def capacity(self, server: Server, name: str) -> float:
        """Return how many requests a second a server answers, asked by four connections."""
        load = Load(
            address=server.address,
            requests=self.requests(name),
            connections=4,
            seconds=self.seconds,
        )
        return send(load).rate


def say(what: str) -> None:
    """Show how far a measurement is."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def send(load: Load) -> Measured:
    """Send a load from a process of its own."""
    with in_own_process() as process:
        return process.submit(drive, load).result()
