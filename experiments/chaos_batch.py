"""Kill encode_users.py and score_batch.py, run them again until done, and count what is lost.

Three are killed by SIGKILL, each so many times at moments drawn at random over the work of a run:
the driver, which works and writes to LMDB itself; a Ray worker that is at a task; and the Redis
server that the tables lie in, which is then started again. A run that ends in an error is begun
again by the same command. A round is over when one ends well: its records or scores are held
against those of an undisturbed run, all is removed, and the next round begins, until all kills are
spent.

    python experiments/chaos_batch.py --data data/complete_journey --bundle runs/<name>/bundle
"""

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import psutil
import redis

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.features.dataset import Dataset
from hashtab.pipelines.requests import write_split
from hashtab.serving.manifest import BundleManifest
from hashtab.serving.store import User, open_store

PIPELINES = Path(__file__).resolve().parent.parent / "pipelines"
SPLIT = "test"
BEGUN = b"shards:"  # what a run shows when its work begins
VICTIMS = ["driver", "worker", "redis-server"]
PATIENCE_S = 60.0
LONGEST_S = 900.0  # of one run; what takes longer hangs


class Job(ABC):
    """One of the two scripts with the places that it reads and writes."""

    name: str

    @abstractmethod
    def command(self, workers: int) -> list[str]:
        """Return the command line."""

    @abstractmethod
    def expect(self) -> None:
        """Take what is there now for what must come out of every round."""

    @abstractmethod
    def compare(self) -> tuple[int, int]:
        """Return how many answers are expected, and how many are there once and bit-identical."""

    @abstractmethod
    def clear(self) -> None:
        """Remove all that was written."""


@dataclass(kw_only=True)
class Encode(Job):
    """All users as of the split's begin into a store; records are compared by their hashes."""

    bundle: Path
    data: Path
    store: str
    expected: dict[User, bytes] = field(default_factory=dict)
    name: str = "encode_users"

    def command(self, workers: int) -> list[str]:
        """Return the command line."""
        options = {"bundle": self.bundle, "data": self.data, "store": self.store, "as_of": SPLIT}
        return _command("encode_users.py", {**options, "workers": workers})

    def found(self) -> dict[User, bytes]:
        """Return a hash of each record."""
        with open_store(self.store, readonly=True) as store:
            items = store.items(_fingerprint(self.bundle))
            return {user: hashlib.sha256(record).digest() for user, record in items}

    def expect(self) -> None:
        """Take the answers that are there for what is expected."""
        self.expected = self.found()

    def compare(self) -> tuple[int, int]:
        """Count the answers expected, and those found once and identical."""
        return len(self.expected), len(self.expected.items() & self.found().items())

    def clear(self) -> None:
        """Remove all answers."""
        with open_store(self.store) as store:
            store.drop(_fingerprint(self.bundle))


@dataclass(kw_only=True)
class Score(Job):
    """All requests of the split; compared by name, order and score."""

    bundle: Path
    requests: Path
    store: str
    output: Path
    expected: pl.DataFrame = field(default_factory=pl.DataFrame)
    name: str = "score_batch"

    def command(self, workers: int) -> list[str]:
        """Return the command line."""
        options = {"bundle": self.bundle, "requests": self.requests, "store": self.store}
        places = {"output": self.output, "rows": 50, "workers": workers}
        return _command("score_batch.py", {**options, **places})

    def found(self) -> pl.DataFrame:
        """Return the scores of all parts."""
        return pl.read_parquet(self.output / "part-*.parquet")

    def expect(self) -> None:
        """Take the answers that are there for what is expected."""
        self.expected = self.found()

    def compare(self) -> tuple[int, int]:
        """Count the answers expected, and those found once and identical."""
        found = self.found()
        once = found.filter(pl.col("request").is_unique())
        both = self.expected.join(once, on="request", suffix="_found")
        same = pl.col("scores").eq_missing(pl.col("scores_found"))
        in_order = found["request"].to_list() == self.expected["request"].to_list()
        return len(self.expected), both.filter(same).height if in_order else 0

    def clear(self) -> None:
        """Remove all answers."""
        shutil.rmtree(self.output, ignore_errors=True)


def _command(script: str, options: dict[str, object]) -> list[str]:
    given = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, str(PIPELINES / script), *given]


def _fingerprint(bundle: Path) -> bytes:
    return BundleManifest.read(bundle).layout.fingerprint


class Server:
    """A Redis server that loses nothing it has acknowledged, whenever it is killed."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "socket"
        self.url = f"unix://{self.socket}"
        durable = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        places = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(folder)]
        self._command = ["redis-server", *places, *durable]
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            deadline = time.monotonic() + PATIENCE_S
            while not _answers(client):
                if time.monotonic() > deadline:
                    raise SystemExit("error: redis-server does not start")
                time.sleep(0.01)

    def kill(self) -> bool:
        """Kill the server and start it again with what it has on its disk."""
        self.process.kill()
        self.process.wait()
        self.start()
        return True


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def kill_driver(run: "subprocess.Popen[bytes]") -> bool:
    run.kill()
    return run.wait() < 0


def kill_worker(run: "subprocess.Popen[bytes]") -> bool:
    """Kill a Ray worker at its task, waiting until there is one; False where the run ended."""
    while run.poll() is None:
        for child in psutil.Process(run.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it ended since it was listed
                if child.name().startswith("ray::_call"):
                    child.kill()
                    return True
        time.sleep(0.005)
    return False


@dataclass(kw_only=True)
class Count:
    """What killing came to; answers are records of users or requests scored."""

    kills: int = 0
    runs: int = 0
    rounds: int = 0
    expected: int = 0
    once: int = 0


class Run:
    """One run of a script, with what it says in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said)

    @property
    def ended(self) -> bool:
        """Whether it has ended, however it did."""
        return self.process.poll() is not None

    def wait_for_work(self) -> None:
        """Wait until its work begins, past imports and the start of Ray."""
        while not self.ended and BEGUN not in self._log.read_bytes():
            time.sleep(0.005)

    def end(self) -> bool:
        """Wait for its end and return whether it ended well."""
        status = self.process.wait(LONGEST_S)
        said = self._log.read_text(errors="replace")
        if "Traceback" in said:  # whatever happens to others, a run says what it was in one line
            print(said, file=sys.stderr)
        return status == 0


def chaos(job: Job, victim: str, server: Server, kills: int, chance: random.Random) -> Count:
    """Kill and run again until all kills are spent and the last round is done."""
    command = job.command(2 if victim == "worker" else 0)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        seconds = _undisturbed(job, command, log)
        count = Count()
        while count.kills < kills:
            done = False
            while not done:
                run = Run(command, log)
                count.runs += 1
                if count.kills < kills:
                    after = chance.uniform(0, seconds)
                    count.kills += _kill(victim, run, server, after)
                done = run.end()
                if count.runs > 20 * kills:
                    raise SystemExit(f"error: {job.name} does not come to its end")
            expected, once = job.compare()
            count.rounds += 1
            count.expected += expected
            count.once += once
            job.clear()
    return count


def _undisturbed(job: Job, command: list[str], log: Path) -> float:
    """Run once, take what comes out for what is expected, and return the seconds of its work."""
    job.clear()
    run = Run(command, log)
    run.wait_for_work()
    start = time.perf_counter()
    if not run.end():
        raise SystemExit(log.read_text())
    seconds = time.perf_counter() - start
    job.expect()
    job.clear()
    return seconds


def _kill(victim: str, run: Run, server: Server, after: float) -> bool:
    """Kill so many seconds after the work began; False where the run had ended before."""
    run.wait_for_work()
    with suppress(subprocess.TimeoutExpired):
        run.process.wait(after)
    if run.ended:
        return False
    if victim == "redis-server":
        return server.kill()
    return kill_worker(run.process) if victim == "worker" else kill_driver(run.process)


def report(name: str, victim: str, count: Count) -> str:
    """Return one row of the table."""
    return (
        f"{name:<14}{victim:<14}{count.kills:>6}{count.runs:>6}{count.rounds:>8}"
        f"{count.expected:>10,}{count.once:>10,}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/complete_journey"))
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20, help="of each victim in each script")
    parser.add_argument("--victims", nargs="+", default=VICTIMS, choices=VICTIMS)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    chance = random.Random(settings.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-batch-") as name:
        work = Path(name)
        requests = work / "requests.parquet"
        write_split(Dataset.open(settings.data), SPLIT, requests)
        (work / "redis").mkdir()
        server = Server(work / "redis")
        try:
            print(f"{'':<28}{'kills':>6}{'runs':>6}{'rounds':>8}{'expected':>10}{'identical':>10}")
            for victim in settings.victims:
                store = server.url if victim == "redis-server" else str(work / "tables")
                encode = Encode(bundle=settings.bundle, data=settings.data, store=store)
                count = chaos(encode, victim, server, settings.kills, chance)
                print(report(encode.name, victim, count), flush=True)
                subprocess.run(encode.command(0), check=True, capture_output=True)
                score = Score(
                    bundle=settings.bundle, requests=requests, store=store, output=work / "scores"
                )
                count = chaos(score, victim, server, settings.kills, chance)
                print(report(score.name, victim, count), flush=True)
        finally:
            server.process.kill()
            server.process.wait()


if __name__ == "__main__":
    main()
