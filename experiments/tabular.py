"""Tables: our models and their rivals on the same fixed splits, in a default and a tuned track.

    python experiments/tabular.py splits --data FOLDER   # writes splits.json: only for new data
    python experiments/tabular.py run --data FOLDER --results runs/tabular --models catboost tabm
    python experiments/tabular.py report --results runs/tabular

FOLDER holds parquet files with a column `target` and a MANIFEST.json, a list of objects with `name`
and `task`. `run` goes on where it was stopped and never makes a run twice. Its runs are ordered by
split, so that wherever it stops the models have the same splits. `report` writes tables and plot;
it reads every run of the models named and selects nothing. The rivals come with
`pip install -e '.[benchmark]'`. The protocol stands in `tabular_benchmark/splits.py` and
`models.py`, what the tuned track draws from in `search_space.py`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# One thread a process, told before any library starts its own; `--workers` fills the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.tabular_benchmark import data, splits
from experiments.tabular_benchmark.aggregate import Comparison
from experiments.tabular_benchmark.models import MODELS
from experiments.tabular_benchmark.report import write
from experiments.tabular_benchmark.runs import RunSettings, due, execute
from experiments.tabular_benchmark.store import TRACKS, Store, read

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("splits", "run"):
        command = commands.add_parser(name)
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--sets", nargs="+", help="all of the manifest when left out")
        command.set_defaults(work=_splits if name == "splits" else _run)
    command.add_argument("--models", nargs="+", choices=list(MODELS), required=True)
    command.add_argument("--track", choices=TRACKS, default="default")
    command.add_argument("--results", type=Path, required=True)
    command.add_argument("--max-splits", type=int, help="of each set; all when left out")
    command.add_argument("--workers", type=int, default=1, help="processes at a time")
    command.add_argument("--threads", type=int, default=1, help="of each model")
    command.add_argument("--devices", nargs="+", default=["cpu"], help="such as cuda:0 cuda:1")
    command.add_argument("--trials", type=int, default=20, help="of a tuned run")
    command.add_argument("--budget-seconds", type=float, default=600.0, help="of a tuned run")
    command = commands.add_parser("report")
    command.add_argument("--results", type=Path, nargs="+", required=True)
    command.add_argument("--models", nargs="+", help="such as tabm 'tabm tuned'; all if left out")
    command.add_argument("--references", nargs="+", default=["catboost", "tabm"])
    command.add_argument("--out", type=Path, default=RESULTS)
    command.set_defaults(work=_report)
    arguments = parser.parse_args()
    try:
        arguments.work(arguments)
    except (data.DataError, BlockingIOError) as error:
        sys.exit(str(error))


def _splits(arguments: argparse.Namespace) -> None:
    known = splits.stored() if splits.SPLITS.exists() else {}
    for name in arguments.sets or data.names(arguments.data):
        known[name] = splits.describe(data.load(arguments.data, name))
    splits.SPLITS.write_text(json.dumps(known, indent=1) + "\n")


def _run(arguments: argparse.Namespace) -> None:
    settings = RunSettings(
        data=arguments.data,
        trials=arguments.trials,
        budget_seconds=arguments.budget_seconds,
        threads=arguments.threads,
        devices=tuple(arguments.devices),
    )
    sets = arguments.sets or data.names(arguments.data)
    keys = due(arguments.data, sets, arguments.models, arguments.track, arguments.max_splits)
    with Store(arguments.results, arguments.models, arguments.track) as store:
        failed = execute(keys, store, settings, arguments.workers)
    if failed:
        sys.exit(f"{failed} runs failed; run the same command again to retry them")


def _report(arguments: argparse.Namespace) -> None:
    records = [record for folder in arguments.results for record in read(folder)]
    models = arguments.models or sorted({record.label for record in records})
    write(Comparison.of(records, models), arguments.references, arguments.out)
    print((arguments.out / "tabular.md").read_text())


if __name__ == "__main__":
    main()
