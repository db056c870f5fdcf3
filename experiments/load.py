"""Put load on the online services and print what they do beside a naive server, in one run.

    python experiments/load.py --bundle runs/<name>/bundle
    python experiments/load.py --bundle runs/<name>/bundle --parts soak --soak-minutes 30

Parts: `scoring` (500 candidates over HTTP), `history` (the same after 100 to 100,000 behaviours),
`freshness` (event posted to visible in a score), `overload` (ten times the capacity), `soak` (70%
of it for long) and `retrieval` (user to ranked items). Each makes users and tables of its own in a
temporary store, starts the services on free ports of this machine and ends them. The client is in
a process of its own; what it costs is measured against a server that answers a constant. Results
are written as JSON and Markdown, a file a part.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.online.bench import Bench
from experiments.online.facts import machine
from experiments.online.freshness import BATCH, EVENTS_PER_S, freshness
from experiments.online.pressure import overload, soak
from experiments.online.report import Figures, write
from experiments.online.retrieval import retrieval
from experiments.online.scoring import history, scoring

RESULTS = Path(__file__).resolve().parent / "results" / "online"

Part = Callable[[Bench, argparse.Namespace], Figures]
PARTS: dict[str, Part] = {
    "scoring": lambda bench, _: scoring(bench),
    "history": lambda bench, _: history(bench),
    "freshness": lambda bench, options: freshness(
        bench, options.events_per_s, options.batch, options.freshness_seconds
    ),
    "overload": lambda bench, options: overload(bench, options.overload_seconds),
    "soak": lambda bench, options: soak(bench, options.soak_minutes),
    "retrieval": lambda bench, options: retrieval(bench, options.data),
}


def main() -> None:
    options = _parser().parse_args()
    facts = machine()
    for name in options.parts:
        with tempfile.TemporaryDirectory(prefix="load-") as work:
            bench = Bench(
                folder=options.bundle.resolve(),
                work=Path(work),
                users=options.users,
                candidates=options.candidates,
                seconds=options.seconds,
                rounds=options.rounds,
            )
            write(PARTS[name](bench, options), facts, options.output, name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", help="prepared data set, for the index of items")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--users", type=int, default=1000, help="with tables in the store")
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one load")
    parser.add_argument("--rounds", type=int, default=3, help="of scorer and rival in turn")
    parser.add_argument("--events-per-s", type=int, default=EVENTS_PER_S)
    parser.add_argument("--batch", type=int, default=BATCH, help="events of one POST")
    parser.add_argument("--freshness-seconds", type=float, default=60.0)
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    parser.add_argument("--soak-minutes", type=float, default=30.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()
