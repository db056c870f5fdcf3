"""Send bad requests to both services: no 5xx, no crash, the right code, a message that helps.

    python experiments/fuzz_online.py --bundle runs/<name>/bundle --requests 100000
    python experiments/fuzz_online.py --bundle ... --replay FILE --service scorer

Half of the requests go to the scorer, half to the BSE service. A fifth is made by schemathesis from
the services' own /openapi.json, right and wrong ones; the rest by generators here: values of the
wrong type, size and sign, what is no JSON or no UTF-8, broken binary tensors, wrong lengths,
garbled HTTP, odd paths. A 503 of a deadline is no fault. After every 200 a good request must be
answered as ever. A request that is answered wrongly is kept in a file and can be sent again; the
same seed makes the same requests.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.online.bad_requests import Bad
from experiments.online.bench import say
from experiments.online.client import request
from experiments.online.described import described
from experiments.online.facts import machine
from experiments.online.fuzz import Found, Fuzz, exchange
from experiments.online.inputs import Events, own_user, score_bodies
from experiments.online.report import Cell, Figures, write
from experiments.online.servers import Server, serving
from experiments.online.targets import TOKEN, WITH_TOKEN, against_bse, against_scorer
from hashtab.serving.bundle import Bundle

RESULTS = Path(__file__).resolve().parent / "results" / "online"
SERVICES = ("scorer", "bse")
_DESCRIBED = 0.2  # share of schemathesis
_EVENTS, _SHOW_EVERY = 50, 5_000


def fuzz(
    bundle_folder: Path, work: Path, failures: Path, count: int, seed: int
) -> dict[str, Found]:
    """Send so many requests, half to each service; return what came of them.

    Args:
        bundle_folder: that both services serve.
        work: empty folder for the store and logs.
        failures: folder for requests that are answered wrongly.
        count: of requests.
        seed: of all generators.
    """
    bundle = Bundle.open(bundle_folder)
    user = own_user(bundle, 0)
    score = request("POST", "/v1/score", score_bodies(bundle, [user], 5)[0])
    made = {"scorer": against_scorer, "bse": against_bse}
    good = {"scorer": score, "bse": request("GET", "/v1/models")}
    found = {}
    with services(bundle_folder, work) as servers:
        fill(servers["bse"], bundle)
        for name, server in servers.items():
            own = round(count / 2 * (1 - _DESCRIBED))
            say(f"fuzz: {count // 2:,} requests to {name}")
            server.close()  # idle while the other service was asked, it may be closed already
            status, openapi = server.ask("GET", "/openapi.json")
            assert status == 200
            of_schema = described(json.loads(openapi), WITH_TOKEN, seed, count // 2 - own)
            requests = chain(made[name](bundle, user, seed, own), of_schema)
            found[name] = Fuzz(server, good[name], failures / name).run(shown(requests))
    return found


@contextmanager
def services(bundle: Path, work: Path) -> Iterator[dict[str, Server]]:
    """Run both services with a token."""
    options = [f"--bundle={bundle}", f"--store={work / 'store'}"]
    token = {"HASHTAB_TOKEN": TOKEN}
    bse = serving(["-m", "hashtab.serving.bse", *options], work / "bse.log", environment=token)
    scorer = ["-m", "hashtab.serving.scorer", *options]
    with bse as first, serving(scorer, work / "scorer.log", environment=token) as second:
        yield {"scorer": second, "bse": first}


def fill(bse: Server, bundle: Bundle) -> None:
    """Give the user that is asked for a history."""
    events, begin_us = Events(bundle, "fill"), 1_700_000_000_000_000
    made = [events.make(own_user(bundle, 0), begin_us + i) for i in range(_EVENTS)]
    status, answer = bse.ask_raw(request("POST", "/v1/events", {"events": made}, WITH_TOKEN))
    if status != 200:
        raise SystemExit(f"error: events are answered {status}: {answer.decode()}")


def shown(requests: Iterator[Bad]) -> Iterator[Bad]:
    """Say how far it is."""
    for number, bad in enumerate(requests):
        if number and number % _SHOW_EVERY == 0:
            say(f"fuzz: {number:,} sent")
        yield bad


def figures(found: dict[str, Found]) -> Figures:
    """Return what the requests came to, by kind."""
    rows: list[dict[str, Cell]] = []
    for name, one in found.items():
        kinds = sorted(one.sent, key=lambda kind: -one.sent[kind])
        rows += [{"service": name, "kind": kind, "requests": one.sent[kind]} for kind in kinds]
        rows.append({"service": name, "kind": "all", "requests": one.sent.total()})
    answers = [
        f"{name}: {', '.join(f'{n:,} x {status}' for status, n in sorted(one.statuses.items()))}; "
        f"{len(one.faults)} faults"
        for name, one in found.items()
    ]
    closed = "0 is a connection that the server closed without an answer, where HTTP was broken"
    return Figures(title="Bad requests", notes=[*answers, closed], rows=rows)


def replay(bundle: Path, service: str, file: Path) -> None:
    """Send one request again and print what comes back."""
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-online-") as work,
        services(bundle, Path(work)) as servers,
    ):
        fill(servers["bse"], Bundle.open(bundle))
        print(exchange(servers[service].address, file.read_bytes()))
        print(servers[service].log.read_text()[-2000:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--replay", type=Path, help="a file of a request, sent again")
    parser.add_argument("--service", choices=SERVICES, default="scorer", help="to replay against")
    options = parser.parse_args()
    bundle = options.bundle.resolve()
    if options.replay is not None:
        replay(bundle, options.service, options.replay)
        return
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="fuzz-online-") as work:
        found = fuzz(bundle, Path(work), options.failures, options.requests, options.seed)
    write(figures(found), facts, options.output, "fuzz")
    faults = [fault for one in found.values() for fault in one.faults]
    for fault in faults:
        print(fault)
    if faults:
        raise SystemExit(f"error: {len(faults)} of {options.requests} were answered wrongly")


if __name__ == "__main__":
    main()
