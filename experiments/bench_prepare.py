"""Prepare Complete Journey as hashtab does and as one padded row a sample; print the ratios.

The padded form is the usual one: pandas collects a household's purchases, and each sample becomes a
row of its candidate, label and the last T item and type ids, zero-padded, written to Parquet. Both
sides make the same samples: the padded side reads which requests and candidates there are from the
prepared data and pays for none of the exposure rule. It runs in chunks of households, on a stated
share of them, and is scaled up by the number of samples.

    python experiments/bench_prepare.py [--length 500] [--share 0.2]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.features.dataset import Dataset
from hashtab.features.datasets import complete_journey
from hashtab.features.prepare import prepare

SPLITS = ("train", "validation", "test")
HOUSEHOLDS_PER_CHUNK = 50


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds, peak resident memory of all processes, and bytes on disk."""

    seconds: float
    peak_bytes: int
    disk_bytes: int


def measure(work: str, output: Path, *arguments: str) -> Cost:
    """Run one side in a process of its own and watch the memory of its whole tree."""
    command = [sys.executable, __file__, "--only", work, "--output", str(output), *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    if process.wait() != 0:
        raise SystemExit(f"error: {work} failed")
    watcher.join()
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Cost(seconds=time.perf_counter() - start, peak_bytes=peak[0], disk_bytes=size)


def _watch(process: "subprocess.Popen[bytes]", peak: list[int]) -> None:
    while process.poll() is None:
        total = 0
        try:
            tree = [psutil.Process(process.pid)]
            tree += tree[0].children(recursive=True)
            for part in tree:
                total += part.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        peak[0] = max(peak[0], total)
        time.sleep(0.05)


def ours(output: Path) -> None:
    prepare(complete_journey.schema(), output)


def padded(output: Path, prepared: Path, length: int, share: float) -> None:
    """Write padded rows for a share of the households, in chunks."""
    output.mkdir()
    items = pd.read_feather(prepared / "tables" / "catalogue.arrow").set_index("_item")
    log = pd.read_parquet(complete_journey.schema().log.patterns[0])
    log = log.join(items[["product_id", "product_type"]], on="product_id", rsuffix="_id")
    log = log.sort_values(["household_id", "transaction_timestamp"])
    histories = {
        user: (part["product_id_id"].to_numpy(), part["product_type"].to_numpy())
        for user, part in log.groupby("household_id")
    }
    users = pd.read_feather(prepared / "tables" / "users.arrow")["_user"]
    for split in SPLITS:
        samples = _samples(prepared, split, items)
        chosen = [user for user, _ in samples.groupby("user")]
        chosen = chosen[: max(1, round(len(chosen) * share))]
        for i in range(0, len(chosen), HOUSEHOLDS_PER_CHUNK):
            some = samples[samples["user"].isin(chosen[i : i + HOUSEHOLDS_PER_CHUNK])]
            rows = [
                _padded_rows(part, histories[users[user]], length)
                for user, part in some.groupby("user")
            ]
            pd.concat(rows).to_parquet(output / f"{split}-{i:05d}.parquet", index=False)


def _samples(prepared: Path, split: str, items: pd.DataFrame) -> pd.DataFrame:
    parts = [pd.read_feather(path) for path in sorted((prepared / "samples" / split).glob("*"))]
    samples = pd.concat(parts, ignore_index=True)
    for name in ("product_id", "product_type"):
        samples[name] = items[name].to_numpy()[samples["row"]]
    return samples[["user", "product_id", "product_type", "history_end", "label"]]


def _padded_rows(
    samples: pd.DataFrame, history: tuple[np.ndarray, np.ndarray], length: int
) -> pd.DataFrame:
    ends = samples["history_end"].to_numpy()
    index = ends[:, None] - length + np.arange(length)
    columns = [np.where(index >= 0, ids[np.maximum(index, 0)], 0) for ids in history]
    return samples.drop(columns="history_end").assign(
        items=list(columns[0].astype(np.int32)), types=list(columns[1].astype(np.int32))
    )


def _n_samples(prepared: Path) -> int:
    splits = Dataset.open(prepared).manifest.splits
    return sum(splits[name].samples for name in SPLITS)


def compare(length: int, share: float) -> None:
    """Measure both sides and print costs and ratios."""
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        place = Path(name)
        mine = measure("ours", place / "ours")
        arguments = ("--prepared", str(place / "ours"), "--length", str(length))
        other = measure("padded", place / "padded", *arguments, "--share", str(share))
        done = sum(pq.read_metadata(path).num_rows for path in (place / "padded").iterdir())
        scale = _n_samples(place / "ours") / done
    print(f"Complete Journey, {os.cpu_count()} cores, padded length {length}")
    print(f"the padded form made {done:,} samples; seconds and bytes are times {scale:.2f}")
    print(f"{'':<24}{'seconds':>10}{'peak GB':>10}{'disk MB':>10}")
    rows = (("hashtab", mine, 1.0), ("padded, one row a sample", other, scale))
    for title, cost, factor in rows:
        print(
            f"{title:<24}{cost.seconds * factor:>10.1f}{cost.peak_bytes / 1e9:>10.2f}"
            f"{cost.disk_bytes * factor / 1e6:>10.0f}"
        )
    faster = other.seconds * scale / mine.seconds
    smaller = other.disk_bytes * scale / mine.disk_bytes
    print(f"hashtab is {faster:.1f} times faster and {smaller:.1f} times smaller on disk")


def main() -> None:
    """Compare, or run one side in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=500, help="T of the padded rows")
    parser.add_argument("--share", type=float, default=0.2, help="of the households, padded side")
    parser.add_argument("--only", choices=("ours", "padded"), help="run one side, not measured")
    parser.add_argument("--output", type=Path, help="folder of --only")
    parser.add_argument("--prepared", type=Path, help="prepared data for --only padded")
    settings = parser.parse_args()
    if settings.only == "ours":
        ours(settings.output)
    elif settings.only == "padded":
        padded(settings.output, settings.prepared, settings.length, settings.share)
    else:
        compare(settings.length, settings.share)


if __name__ == "__main__":
    main()
