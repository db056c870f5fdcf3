#!/usr/bin/env python3
"""Score a table, CSV or Parquet, with an exported model of tables, each row exactly once.

`python pipelines/score_table.py --bundle models:/my_model@champion --rows new.parquet --output
scores --keep [customer_id]` writes a row for each row, in their order. Killed at any moment and run
again, it does what is left; `--verify` counts an output again.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import polars as pl

from hashtab.features.errors import DataError
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.leave import STOPPED
from hashtab.pipelines.outputs import MANIFEST, Output, say_ignored, scan_parts, unreadable
from hashtab.pipelines.places import DEFAULT_TRACKING, python_script, shown
from hashtab.pipelines.registry import find_bundle
from hashtab.pipelines.table_scoring import ROW, RowFiles, TableScoring
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.table_bundle import TableBundle


@dataclass(frozen=True, kw_only=True)
class ScoreTableSettings:
    """Settings of batch scoring of a table.

    Args:
        bundle: folder of a bundle, or models:/<name>@champion in the registry.
        rows: CSV or Parquet file, folder of such, or glob, with the columns that the model reads.
        output: folder of the scores.
        keep: columns passed through, such as an identifier; the row's number is always there. What
            a CSV calls missing, such as NA, is null.
        rows_per_part: of the output.
        workers: Ray tasks at a time, one core each; 0 scores in this process.
        address: of a Ray cluster, for example auto.
        verify: count the output again, and score nothing.
        tracking_uri: of MLflow, for a bundle in the registry.
    """

    bundle: str | None = None
    rows: str | None = None
    output: str = "scores"
    keep: tuple[str, ...] = ()
    rows_per_part: int = 100_000
    workers: int = 0
    address: str | None = None
    verify: bool = False
    tracking_uri: str = DEFAULT_TRACKING

    def __post_init__(self) -> None:
        if self.rows_per_part < 1 or self.workers < 0:
            raise SettingsError(
                "rows_per_part must be positive and workers not negative, "
                f"got {self.rows_per_part}, {self.workers}"
            )


@dataclass(frozen=True, kw_only=True)
class TableSummary:
    """What a scored output holds, by the count of its files.

    Args:
        rows: scored, each once.
    """

    rows: int


def score(settings: ScoreTableSettings) -> TableSummary:
    """Score what is left of a table and return what the whole output holds.

    Raises:
        SettingsError: if a setting cannot be used, or the output holds another job.
        BundleError, DataError, RequestError: if one of these cannot be used.
    """
    output = Output(Path(settings.output).resolve(), TableScoring, TableSummary, count)
    if settings.verify:
        return output.verified()
    if settings.bundle is None or settings.rows is None:
        raise SettingsError("--bundle and --rows must be given")
    bundle = TableBundle.open(find_bundle(settings.bundle, settings.tracking_uri).resolve())
    files = RowFiles.find(settings.rows, bundle.manifest, settings.keep)
    job = TableScoring(
        bundle=str(bundle.folder),
        bundle_digest=bundle.manifest.digest,
        requests=tuple(files.hashes()),
        count=0,
        rows=settings.rows_per_part,
        keep=settings.keep,
        output=str(output.folder),
    )
    if not (output.folder / MANIFEST).exists():
        say_ignored(files.ignored)
    return output.score(job, files.write, settings.workers, settings.address)


def count(job: TableScoring) -> TableSummary:
    """Count the scores of all parts.

    Raises:
        RequestError: if a part is missing or cannot be read, or a row is not there once.
    """
    numbers = pl.col(ROW)
    rows = scan_parts(job).select(pl.len(), numbers.n_unique().alias("once"), numbers.max())
    try:
        found, once, last = rows.collect().row(0)
    except pl.exceptions.PolarsError as error:
        raise unreadable(job, error) from error
    if not found == once == job.count or (found and last != found - 1):
        raise RequestError(
            f"{job.output} holds {found:,} rows, {job.count:,} were asked: remove it and score "
            "again"
        )
    return TableSummary(rows=found)


def report(settings: ScoreTableSettings, summary: TableSummary, seconds: float) -> str:
    """Say what was made, where it lies and what to run next."""
    output = shown(Path(settings.output))
    return "\n".join(
        [
            f"{output}: {summary.rows:,} rows in {seconds:.1f} s, each once",
            f"next: {python_script('score_table.py')} --output {output} --verify  (counts them "
            "again)",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse, score, report; what cannot be scored ends with one line and exit code 2."""
    start = time.perf_counter()
    try:
        settings = parse(ScoreTableSettings, arguments, __doc__)
        summary = score(settings)
    except (SettingsError, DataError, BundleError, RequestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    print(report(settings, summary, time.perf_counter() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
