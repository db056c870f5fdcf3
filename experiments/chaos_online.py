"""Kill BSE services, and the Redis server of their tables, while events are delivered to them.

Each event is delivered once and half of them, on average, again, all shuffled, over HTTP to two
services that share a store; one that cannot answer gets the same events again, perhaps under
another service. Services are killed by SIGKILL at moments spread over the deliveries, and so is the
Redis server where the tables lie in one (`appendonly yes`, `appendfsync always`); each is started
again. In the end the log must hold each event that was acknowledged once, and each user's table
must have the bytes of one that is built from all of their events at once.

    python experiments/chaos_online.py --bundle runs/<name>/bundle --store lmdb --store redis
"""

import argparse
import http.client
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.online.facts import machine
from experiments.online.servers import free_port
from hashtab.serving.bse.applying import from_log
from hashtab.serving.bse.model import Model
from hashtab.serving.store import Event, StoreError, open_store, pack, unpack

SERVICES = 2
ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60.0
_START_S = 10.0  # that a service which is to be killed is given to be at work
_FIRST_US = 1_700_000_000_000_000


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """One run.

    Args:
        bundle: folder.
        store: lmdb or redis.
        users: among whom events are drawn.
        events: different ones.
        deliveries: of them, each at least once.
        batch: events of one request.
        kills: of services.
        server_kills: of the Redis server.
        seed: of everything that is drawn.
        folder: for the store and logs, removed in the end.
    """

    bundle: str
    store: str
    users: int = 2000
    events: int = 1_000_000
    deliveries: int = 2_000_000
    batch: int = 500
    kills: int = 200
    server_kills: int = 50
    seed: int = 0
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="chaos-")))


@dataclass
class Found:
    """What came out of a run."""

    acknowledged: int = 0
    kills: int = 0
    kills_at_work: int = 0
    server_kills: int = 0
    lost: int = 0
    twice: int = 0
    wrong_tables: int = 0
    users: int = 0
    refused_requests: int = 0
    outcomes: dict[str, int] = field(
        default_factory=lambda: {"accepted": 0, "duplicate": 0, "late": 0}
    )
    seconds: float = 0.0


def events_of(chaos: Chaos, model: Model) -> list[dict[str, Any]]:
    """Events as they are sent; times repeat, so that ids decide their order as well."""
    chance = random.Random(chaos.seed)
    items = model.bundle.catalogue.items.to_list()
    names = [f"user {i}" if model.text_users else i for i in range(chaos.users)]
    return [
        {
            "id": f"e{i}",
            "user": chance.choice(names),
            "item": chance.choice(items),
            "time": _FIRST_US + chance.randrange(chaos.events) * 1_000_000 // 4,
            "side": {},
        }
        for i in range(chaos.events)
    ]


class Killable:
    """A process that is started again whenever it is killed."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command = command
        self._log = log
        self._changing = threading.Lock()
        self._ended = False
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("a") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, cwd=ROOT)

    def kill(self) -> None:
        """Kill it by SIGKILL, and start it again."""
        with self._changing:
            self._process.kill()
            self._process.wait()
            if not self._ended:
                self._process = self._start()

    def look(self) -> None:
        """Start it again where it ended by itself, as whoever looks after services would."""
        with self._changing:
            if not self._ended and self._process.poll() is not None:
                self._process = self._start()

    def end(self) -> None:
        """End it for good."""
        with self._changing:
            self._ended = True
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            self._process.kill()
            self._process.wait()


class Delivery:
    """Threads that hand all batches to services until each was acknowledged."""

    def __init__(self, batches: list[bytes], ports: list[int], found: Found, whole: int) -> None:
        self._batches = batches
        self._ports = ports
        self._found = found
        self._left = list(range(len(batches)))[::-1]
        self._lock = threading.Lock()
        self.done = 0
        self._progress = tqdm(total=whole, unit="event", file=sys.stderr)

    def run(self, threads: int) -> None:
        """Deliver everything."""
        running = [threading.Thread(target=self._deliver, args=(i,)) for i in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        self._progress.close()

    def _deliver(self, turn: int) -> None:
        connection = self._connection(turn)
        while (number := self._next()) is not None:
            while (answer := self._post(connection, self._batches[number])) is None:
                turn += 1
                connection.close()
                time.sleep(0.02)
                connection = self._connection(turn)
            self._acknowledge(answer)
        connection.close()

    def _connection(self, turn: int) -> http.client.HTTPConnection:
        port = self._ports[turn % len(self._ports)]
        return http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def _next(self) -> int | None:
        with self._lock:
            return self._left.pop() if self._left else None

    def _post(self, connection: http.client.HTTPConnection, body: bytes) -> Any | None:
        """Return the answer; None where the events must be sent again."""
        try:
            connection.request("POST", "/v1/events", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            return None
        if answer.status in (429, 503):
            with self._lock:
                self._found.refused_requests += 1
            return None
        assert answer.status == 200, content
        return json.loads(content)

    def _acknowledge(self, answer: Any) -> None:
        with self._lock:
            for name in self._found.outcomes:
                self._found.outcomes[name] += answer[name]
            count = sum(answer[name] for name in self._found.outcomes)
            self._found.acknowledged += count
            self.done += count
            self._progress.update(count)


def run(chaos: Chaos) -> Found:
    """Deliver, kill, and hold what is there in the end against what was sent."""
    model, found, begun = Model.open(chaos.bundle), Found(), time.perf_counter()
    events = events_of(chaos, model)
    chance = random.Random(chaos.seed + 1)
    more = chance.choices(range(len(events)), k=chaos.deliveries - len(events))
    order = [*range(len(events)), *more]
    chance.shuffle(order)
    batches = [
        json.dumps({"events": [events[i] for i in order[start : start + chaos.batch]]}).encode()
        for start in range(0, len(order), chaos.batch)
    ]
    chaos.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, chaos.folder, ignore_errors=True)
        url, server = _store(chaos, stack)
        ports = [free_port() for _ in range(SERVICES)]
        services = [_service(chaos, url, port, stack) for port in ports]
        delivery = Delivery(batches, ports, found, len(order))
        killer = threading.Thread(
            target=_kill, args=(chaos, delivery, services, ports, server, found, len(order))
        )
        killer.start()
        delivery.run(2 * SERVICES)
        killer.join()
        for service in services:
            service.end()
        _wait_for_store(url)
        check(url, model, events, found)
    found.seconds = time.perf_counter() - begun
    return found


def _store(chaos: Chaos, stack: ExitStack) -> tuple[str, Killable | None]:
    if chaos.store == "lmdb":
        return str(chaos.folder / "store"), None
    program = shutil.which("redis-server")
    assert program is not None, "install redis-server"
    socket = str(chaos.folder / "socket")
    place = ["--dir", str(chaos.folder), "--unixsocket", socket, "--port", "0"]
    durable = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    server = Killable([program, *place, *durable], chaos.folder / "redis.log")
    stack.callback(server.end)
    url = f"unix://{socket}"
    _wait_for_store(url)
    return url, server


def _wait_for_store(url: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            open_store(url).close()
            return
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _service(chaos: Chaos, url: str, port: int, stack: ExitStack) -> Killable:
    command = [sys.executable, "-m", "hashtab.serving.bse", "--store", url]
    options = ["--bundle", chaos.bundle, "--port", str(port)]
    service = Killable([*command, *options], chaos.folder / f"service-{port}.log")
    stack.callback(service.end)
    return service


def _kill(
    chaos: Chaos,
    delivery: Delivery,
    services: list[Killable],
    ports: list[int],
    server: Killable | None,
    found: Found,
    whole: int,
) -> None:
    """Kill at moments spread over the deliveries."""
    chance = random.Random(chaos.seed + 2)
    victims = ["service"] * chaos.kills + ["server"] * (chaos.server_kills if server else 0)
    chance.shuffle(victims)
    for number, victim in enumerate(victims):
        target = 0.95 * whole * (number + chance.random()) / len(victims)
        while delivery.done < target:
            time.sleep(0.005)
            for service in services:
                service.look()
        if victim == "server" and server is not None:
            server.kill()
            found.server_kills += 1
        else:
            chosen = chance.randrange(len(services))
            found.kills_at_work += _is_ready(ports[chosen])
            services[chosen].kill()
            found.kills += 1


def _is_ready(port: int) -> bool:
    """Whether a service answers, given some seconds to start."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with closing(connection), suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health/live")
            if connection.getresponse().status == 200:
                return True
        time.sleep(0.05)
    return False


def written_whole(record: bytes | None, model: Model) -> bytes:
    """Return a record with its delta as one that was written at once; nothing if it is damaged."""
    try:
        return pack(unpack(record or b"", model.layout), model.layout)
    except StoreError:
        return b""


def check(url: str, model: Model, sent: list[dict[str, Any]], found: Found) -> None:
    """Hold log and tables against what was sent."""
    by_user: dict[Any, list[Event]] = {}
    for event in sent:
        by_user.setdefault(event["user"], []).append(Event(**event))
    found.users = len(by_user)
    with open_store(url, readonly=True) as store:
        for user, events in tqdm(by_user.items(), desc="check", file=sys.stderr):
            kept = Counter(event.id for event in store.events(user))
            found.lost += sum(event.id not in kept for event in events)
            found.twice += sum(count - 1 for count in kept.values())
            with store.reading() as log:
                (head,), (record,) = log.heads([user]), log.records(model.fingerprint, [user])
            assert head is not None
            rebuilt = from_log(model, user, events, head)
            found.wrong_tables += written_whole(record, model) != rebuilt
            found.twice += head.events - len(kept)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--store", action="append", choices=["lmdb", "redis"])
    for name in ("users", "events", "deliveries", "batch", "kills", "server_kills", "seed"):
        default = getattr(Chaos, name)
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--results", type=Path, default=ROOT / "experiments/results/online")
    options = vars(parser.parse_args())
    results, stores = options.pop("results"), options.pop("store") or ["lmdb", "redis"]
    wrong = 0
    for store in stores:
        chaos = Chaos(store=store, **options)
        found = run(chaos)
        wrong += found.lost + found.twice + found.wrong_tables
        settings = {k: v for k, v in asdict(chaos).items() if k not in ("folder", "bundle")}
        results.mkdir(parents=True, exist_ok=True)
        said = {"machine": machine(), "settings": settings, "found": asdict(found)}
        path = results / f"chaos_{store}.json"
        path.write_text(json.dumps(said, indent=1) + "\n")
        print(
            f"{store}: {found.acknowledged:,} deliveries acknowledged, {found.kills} services "
            f"({found.kills_at_work} at work) and {found.server_kills} servers killed in "
            f"{found.seconds:.0f} s; {found.lost} events lost, {found.twice} twice, "
            f"{found.wrong_tables} of {found.users} tables wrong: {path}"
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
