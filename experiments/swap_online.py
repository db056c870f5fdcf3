"""Swap models under load and hold every answer against the model that it names.

    python experiments/swap_online.py --data data/complete_journey --swaps 200

The models are not trained: they differ in weights and hash planes, and so in every table. For each
swap the BSE service builds all tables of the next model from its event log, then the scorer loads
it, while requests go on at 70% of the capacity. Each answer is compared with the offline score of
the very bundle that it names, with that bundle's tables.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.online.bench import say
from experiments.online.facts import machine
from experiments.online.report import write
from experiments.online.swaps import Plan, swap
from hashtab.features.dataset import Dataset
from hashtab.models.ctr import ClickModel, ClickModelSettings, FeatureSpec
from hashtab.pipelines.bundles import export_model
from hashtab.pipelines.saved_model import save_model

RESULTS = Path(__file__).resolve().parent / "results" / "online"


def make(folder: Path, dataset: Dataset, seed: int) -> Path:
    """Export an untrained model and return the folder of its bundle."""
    torch.manual_seed(seed)
    features = FeatureSpec.from_dict(asdict(dataset.manifest.features))
    model = ClickModel(features, ClickModelSettings(counters=bool(features.counters)))
    save_model(folder / "model", model, dataset.manifest)
    export_model(folder / "model", dataset, folder / "bundle", {})
    return folder / "bundle"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/complete_journey"))
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--every-s", type=float, default=1.0, help="seconds between two swaps")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one load")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset, facts = Dataset.open(options.data), machine()
    with tempfile.TemporaryDirectory(prefix="swap-online-") as name:
        work = Path(name)
        bundles = []
        for seed in range(options.models):
            say(f"exporting model {seed + 1} of {options.models}")
            bundles.append(make(work / str(seed), dataset, seed))
        plan = Plan(
            bundles=bundles,
            work=work,
            swaps=options.swaps,
            every_s=options.every_s,
            seconds=options.seconds,
        )
        figures, found, failed = swap(plan)
    write(figures, facts, options.output, "swaps")
    if failed or found.wrong or found.without_table:
        raise SystemExit("error: some answers were not those of one model with its tables")


if __name__ == "__main__":
    main()
