#!/usr/bin/env python3
"""Prepare a behaviour log for training: histories once per user, samples that point into them.

`python pipelines/prepare.py` prepares the default data set; `--schema my.yaml` one's own log.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hashtab.features.datasets import SCHEMAS
from hashtab.features.errors import DataError
from hashtab.features.manifest import Manifest
from hashtab.features.plain import did_you_mean
from hashtab.features.prepare import prepare
from hashtab.features.schema import Schema
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.leave import STOPPED
from hashtab.pipelines.places import python_script, shown
from hashtab.pipelines.shard_tasks import run_shards


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Settings of preparation.

    Args:
        dataset: a data set that is known by name.
        schema: YAML file that declares one's own log, in place of dataset.
        output: folder of the finished data set; data/<name> by default.
        shards: user shards, the unit of parallelism; changes no sample.
        workers: 0 prepares the shards in this process, which uses its cores already; more run them
            as that many Ray tasks at a time, on the cluster of address or a local one.
        address: Ray cluster to run on, for example auto.
    """

    dataset: str = "complete_journey"
    schema: str | None = None
    output: str | None = None
    shards: int = 16
    workers: int = 0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise DataError(f"shards must be positive, got {self.shards}")
        if self.workers < 0:
            raise DataError(f"workers must not be negative, got {self.workers}")
        if self.schema is None and self.dataset not in SCHEMAS:
            raise DataError(
                f"dataset {self.dataset!r} is not known{did_you_mean(self.dataset, list(SCHEMAS))}"
            )

    def load_schema(self) -> Schema:
        """Return the declared schema."""
        return Schema.from_yaml(self.schema) if self.schema else SCHEMAS[self.dataset]()


def report(manifest: Manifest, folder: Path, seconds: float) -> str:
    """Say what was made, where it lies and what to run next."""
    lengths = ", ".join(f"{percent}%: {n}" for percent, n in manifest.history_quantiles.items())
    size = sum(info.size for info in manifest.files.values()) / 1e6
    lines = [
        f"{manifest.schema.name}: {manifest.users:,} users, {manifest.items:,} items, "
        f"{manifest.behaviours:,} behaviours",
        f"behaviours of a user, by share of the users with fewer: {lengths}",
        f"{'split':<20}{'users':>10}{'requests':>12}{'samples':>12}{'positive':>10}",
    ]
    for name, info in manifest.splits.items():
        rate = info.positives / info.samples
        lines.append(
            f"{name:<20}{info.users:>10,}{info.requests:>12,}{info.samples:>12,}{rate:>10.1%}"
        )
    dropped = sum(manifest.duplicates.values())
    lines.append(f"duplicate rows dropped: {dropped:,}")
    lines.append(
        f"{shown(folder)}: {size:,.0f} MB in {seconds:.1f} s, digest {manifest.digest[:12]}"
    )
    lines.append(f"next: {python_script('train_sdim.py')} --data {shown(folder)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse, prepare, report; bad input and settings end with one line and exit code 2."""
    start = time.perf_counter()
    try:
        settings = parse(PrepareSettings, arguments, __doc__)
        schema = settings.load_schema()
        folder = Path(settings.output or f"data/{schema.name}")
        run = partial(run_shards, workers=settings.workers)
        # Opened first, so that one which is not there is met before any work.
        with cluster(settings.workers, settings.address):
            manifest = prepare(schema, folder, shards=settings.shards, run_shards=run)
    except (DataError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    print(report(manifest, folder, time.perf_counter() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
