"""What the Complete Journey protocol is worth before anything is learned, for each split.

Prints the AUC of popularity alone (near one half where negatives are matched by it) and the gAUC of
the untrained count rule: 10 x times this product was bought + times its type was.

    python experiments/protocol_complete_journey.py data/complete_journey
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.feather

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.features.dataset import Dataset
from hashtab.features.metrics import Metrics, auc


def main(folder: Path) -> None:
    dataset = Dataset.open(folder)
    popularity = pyarrow.feather.read_table(folder / "tables" / "popularity.arrow")
    count = popularity["_train_count"].to_numpy()
    print(f"{'split':<20}{'samples':>10}{'popularity AUC':>16}{'rule gAUC':>12}{'rule AUC':>10}")
    for split, info in dataset.manifest.splits.items():
        rule = Metrics(probabilities=False)
        for batch in dataset.batches(split):
            users = np.repeat(batch.users, np.diff(batch.sample_offsets))
            times = np.expm1(batch.counters)
            rule.update(batch.labels, 10 * times[:, 0] + times[:, 1], users)
        found = rule.compute()
        files = sorted((folder / "samples" / split).glob("*"))
        tables = [pyarrow.feather.read_table(path, columns=["_row", "_label"]) for path in files]
        rows, labels = (
            np.concatenate([table[name].to_numpy() for table in tables])
            for name in ("_row", "_label")
        )
        print(
            f"{split:<20}{info.samples:>10,}{auc(labels, count[rows]):>16.3f}"
            f"{found['gauc']:>12.3f}{found['auc']:>10.3f}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/complete_journey"))
