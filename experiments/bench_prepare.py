"""Prepare Complete Journey as hashtab does and as one padded row a sample; print the ratios.

The padded form is the usual one: pandas finds the exposures, and each sample becomes a row of its
candidate, label and the last T item and type ids, zero-padded, in Parquet. It is written twice: in
the order in which it is made, where Parquet squeezes neighbours with the same history, and with
rows shuffled, as training wants to read them. Rows are made in chunks of households, for a stated
share of them; seconds and bytes of that part are scaled up by the samples left. It makes no second
set of negatives, counters or encoders, which hashtab's time includes.

    python experiments/bench_prepare.py [--length 500] [--share 0.2]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.features.datasets import complete_journey
from hashtab.features.prepare import prepare

NEGATIVES = 4
HOUSEHOLDS_PER_CHUNK = 50


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds, peak resident memory, and bytes on disk."""

    seconds: float
    peak_bytes: int
    disk_bytes: int


def measure(work: str, output: Path, *arguments: str) -> Cost:
    """Run one side in a process of its own; neither side starts others."""
    command = [sys.executable, __file__, "--only", work, "--output", str(output), *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"error: {work} failed")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    seconds = time.perf_counter() - start
    return Cost(seconds=seconds, peak_bytes=usage.ru_maxrss * 1024, disk_bytes=size)


def ours(output: Path) -> None:
    prepare(complete_journey.schema(), output)


def padded(output: Path, length: int, share: float, shuffle: bool) -> None:
    """Write padded rows for a share of the households; leave seconds and scale beside them."""
    start = time.perf_counter()
    output.mkdir()
    schema = complete_journey.schema()
    log = pd.read_parquet(schema.tables["behaviours"].patterns[0])
    samples = _exposures(log, pd.read_parquet(schema.tables["pool"].patterns[0]))
    histories, ids = _histories(log, pd.read_parquet(schema.tables["items"].patterns[0]))
    fixed = time.perf_counter() - start
    households = samples["household_id"].unique()
    households = households[: max(1, round(len(households) * share))]
    written = 0
    for i in range(0, len(households), HOUSEHOLDS_PER_CHUNK):
        some = samples[samples["household_id"].isin(households[i : i + HOUSEHOLDS_PER_CHUNK])]
        rows = pd.concat(
            _padded_rows(part, histories[part["household_id"].iloc[0]], ids, length)
            for _, part in some.groupby("household_id")
        )
        written += len(rows)
        if shuffle:
            rows = rows.sample(frac=1.0, random_state=0)
        rows.to_parquet(output / f"{i:05d}.parquet", index=False)
    scale = len(samples) / written
    seconds = fixed + (time.perf_counter() - start - fixed) * scale
    _notes(output).write_text(json.dumps({"seconds": seconds, "scale": scale}))


def _notes(output: Path) -> Path:
    return output.with_suffix(".json")


def _exposures(log: pd.DataFrame, promotions: pd.DataFrame) -> pd.DataFrame:
    """Positives on promotion and four popularity-matched negatives for each, in pandas."""
    shop, rng = ["store_id", "week"], np.random.default_rng(0)
    counts = log[log["week"] <= 43]["product_id"].value_counts()
    pool = promotions.drop_duplicates([*shop, "product_id"])
    pool = pool[pool["product_id"].isin(counts.index)].merge(log[shop].drop_duplicates())
    first = log.sort_values("transaction_timestamp", kind="stable")
    first = first.drop_duplicates(["household_id", "week", "product_id"])
    positives = first.merge(pool, on=[*shop, "product_id"]).assign(label=1)
    offered = {key: part["product_id"].to_numpy() for key, part in pool.groupby(shop)}
    drawn = []
    for key, part in positives.groupby(shop):
        weights = counts.loc[offered[key]].to_numpy()
        part = part.loc[part.index.repeat(NEGATIVES)]
        picked = rng.choice(offered[key], len(part), p=weights / weights.sum())
        drawn.append(part.assign(product_id=picked, label=0))
    negatives = pd.concat(drawn)
    bought = pd.MultiIndex.from_frame(first[["household_id", "week", "product_id"]])
    asked = pd.MultiIndex.from_frame(negatives[["household_id", "week", "product_id"]])
    columns = ["household_id", "product_id", "transaction_timestamp", "label"]
    both = pd.concat([positives, negatives[~asked.isin(bought)]])[columns]
    return both.sort_values(columns[:1] + columns[2:3], ignore_index=True)


def _histories(
    log: pd.DataFrame, items: pd.DataFrame
) -> tuple[dict[int, tuple[np.ndarray, ...]], pd.DataFrame]:
    ids = pd.DataFrame(
        {
            "item": np.arange(1, len(items) + 1, dtype=np.int32),
            "type": items["product_type"].factorize()[0].astype(np.int32) + 1,
        },
        index=items["product_id"],
    )
    ids = ids.reindex(np.union1d(ids.index, log["product_id"].unique()), fill_value=0)
    log = log.sort_values(["household_id", "transaction_timestamp"])
    histories = {
        int(part["household_id"].iloc[0]): (
            part["transaction_timestamp"].to_numpy(),
            *ids.loc[part["product_id"]].to_numpy().T,
        )
        for _, part in log.groupby("household_id")
    }
    return histories, ids


def _padded_rows(
    samples: pd.DataFrame, history: tuple[np.ndarray, ...], ids: pd.DataFrame, length: int
) -> pd.DataFrame:
    times, *columns = history
    ends = np.searchsorted(times, samples["transaction_timestamp"].to_numpy())
    index = ends[:, None] - length + np.arange(length)
    padded = [np.where(index >= 0, ids[np.maximum(index, 0)], 0) for ids in columns]
    candidates = ids.loc[samples["product_id"]]
    return samples.assign(
        item=candidates["item"].to_numpy(),
        type=candidates["type"].to_numpy(),
        items=list(padded[0]),
        types=list(padded[1]),
    )


def compare(length: int, share: float) -> None:
    """Measure both sides and print costs and ratios."""
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        place = Path(name)
        costs = [("hashtab", measure("ours", place / "ours"))]
        arguments = ("--length", str(length), "--share", str(share))
        for work in ("padded", "shuffled"):
            cost = measure(work, place / work, *arguments)
            notes = json.loads(_notes(place / work).read_text())
            disk = round(cost.disk_bytes * notes["scale"])
            cost = replace(cost, seconds=notes["seconds"], disk_bytes=disk)
            costs.append((f"{work}, one row a sample", cost))
    print(f"Complete Journey, {os.cpu_count()} cores, padded length {length}, share {share}")
    print(f"{'':<28}{'seconds':>9}{'peak GB':>9}{'disk MB':>9}{'times ours:':>12} time, disk")
    mine = costs[0][1]
    for title, cost in costs:
        print(
            f"{title:<28}{cost.seconds:>9.1f}{cost.peak_bytes / 1e9:>9.2f}"
            f"{cost.disk_bytes / 1e6:>9.0f}{'':>12}"
            f" {cost.seconds / mine.seconds:.1f}, {cost.disk_bytes / mine.disk_bytes:.1f}"
        )


def main() -> None:
    """Compare, or run one side in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=500, help="T of the padded rows")
    parser.add_argument("--share", type=float, default=0.2, help="of the households, padded side")
    parser.add_argument(
        "--only", choices=("ours", "padded", "shuffled"), help="run one side, not measured"
    )
    parser.add_argument("--output", type=Path, help="folder of --only")
    settings = parser.parse_args()
    if settings.only == "ours":
        ours(settings.output)
    elif settings.only:
        shuffle = settings.only == "shuffled"
        padded(settings.output, settings.length, settings.share, shuffle)
    else:
        compare(settings.length, settings.share)


if __name__ == "__main__":
    main()
