#!/usr/bin/env python3
"""Score a file of requests with an exported model, each request exactly once.

`python pipelines/score_batch.py --bundle models:/hashtab@champion --store tables --requests
requests.parquet --output scores` writes a row for each request, in their order. Killed at any
moment and run again, it does what is left; `--verify` counts an output again.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import polars as pl

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.encoding import absolute_store, moment, tables_of
from hashtab.pipelines.leave import STOPPED
from hashtab.pipelines.outputs import MANIFEST, Output, say_ignored, scan_parts, unreadable
from hashtab.pipelines.places import DEFAULT_TRACKING, python_script, shown
from hashtab.pipelines.registry import find_bundle
from hashtab.pipelines.requests import CANDIDATE, CANDIDATES, REQUEST, RequestFiles
from hashtab.pipelines.scoring import (
    EMPTY,
    ENCODED,
    HISTORY,
    MISSING,
    SCORE,
    STORED,
    UNKNOWN,
    Scoring,
)
from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.store import StoreError, open_store


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Settings of batch scoring.

    Args:
        bundle: folder of a bundle, or models:/<name>@champion in the registry.
        requests: CSV or Parquet file, folder of such, or glob, with a column user, lists of items
            in candidates (or one a row in candidate, with the request's name in request), the
            time if the model reads it, and the model's context features.
        output: folder of the scores.
        store: of user tables, as encode_users.py wrote them.
        data: prepared data set whose histories are encoded where a user has no table.
        as_of: moment that these histories are cut at, as of encode_users.py; by default all.
        top: candidates kept of each request, best first; by default all, in the order asked.
        rows: requests of one part of the output.
        workers: Ray tasks at a time, one core each; 0 scores in this process.
        address: of a Ray cluster, for example auto.
        verify: count the output again, and score nothing.
        tracking_uri: of MLflow, for a bundle in the registry.
    """

    bundle: str | None = None
    requests: str | None = None
    output: str = "scores"
    store: str | None = None
    data: str | None = None
    as_of: str | None = None
    top: int | None = None
    rows: int = 2000
    workers: int = 2
    address: str | None = None
    verify: bool = False
    tracking_uri: str = DEFAULT_TRACKING

    def __post_init__(self) -> None:
        if self.rows < 1 or self.workers < 0:
            raise SettingsError(
                f"rows must be positive and workers not negative, got {self.rows}, {self.workers}"
            )
        if self.top is not None and self.top < 1:
            raise SettingsError(f"top must be positive, got {self.top}")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a scored output holds, by the count of its files.

    Args:
        requests: scored, each once.
        candidates: scored.
        stored: requests whose user had a table in the store.
        encoded: requests whose user's table was made from a history.
        empty: requests that were scored with an empty history.
        unknown_candidates: that no one knew when the model was trained.
        missing_context: candidates with a context value missing.
    """

    requests: int
    candidates: int
    stored: int
    encoded: int
    empty: int
    unknown_candidates: int
    missing_context: int


def score(settings: ScoreSettings) -> Summary:
    """Score what is left of the requests and return what the whole output holds.

    Raises:
        SettingsError: if a setting cannot be used, or the output holds another job.
        BundleError, DataError, StoreError, RequestError: if one of these cannot be used.
    """
    output = Output(Path(settings.output).resolve(), Scoring, Summary, count)
    if settings.verify:
        return output.verified()
    if settings.bundle is None or settings.requests is None:
        raise SettingsError("--bundle and --requests must be given")
    if settings.as_of is not None and settings.data is None:
        raise SettingsError("--as_of cuts the histories of --data: give that too, or leave it out")
    bundle = Bundle.open(find_bundle(settings.bundle, settings.tracking_uri).resolve())
    files = RequestFiles.find(settings.requests, bundle)
    job, place = _job(settings, output.folder, bundle, files)
    if not (output.folder / MANIFEST).exists():
        say_ignored(files.ignored)
    shown = replace(job, store=place)
    return output.score(job, files.write, settings.workers, settings.address, shown=shown)


def _job(
    settings: ScoreSettings, output: Path, bundle: Bundle, files: RequestFiles
) -> tuple[Scoring, str | None]:
    """Check the places that tables come from, and join all that decides the scores.

    Returns:
        The job, and its store in words.
    """
    needs = bundle.layout.groups or bundle.layout.recent or bundle.layout.counters
    if needs and settings.store is None and settings.data is None:
        raise SettingsError(
            "the model reads histories: give the --store of user tables, or the --data to encode "
            "them from"
        )
    store = place = tables = None
    if settings.store is not None:
        store = absolute_store(settings.store)
        with open_store(store, readonly=True) as opened:  # met before any work if it cannot be read
            place, tables = opened.name, tables_of(opened, bundle.layout.fingerprint)
    dataset = None if settings.data is None else Dataset.open(settings.data)
    job = Scoring(
        bundle=str(bundle.folder),
        bundle_digest=bundle.manifest.digest,
        requests=tuple(files.hashes()),
        count=0,
        one_a_row=files.one_a_row,
        rows=settings.rows,
        store=store,
        tables=tables,
        data=None if dataset is None else str(dataset.folder.resolve()),
        data_digest=None if dataset is None else dataset.manifest.digest,
        as_of=None if dataset is None else moment(dataset, settings.as_of),
        top=settings.top,
        output=str(output),
    )
    return job, place


def count(scoring: Scoring) -> Summary:
    """Count the scores of all parts.

    Raises:
        RequestError: if a part is missing or cannot be read, or a request is not there once.
    """
    rows = scan_parts(scoring)
    try:
        if scoring.one_a_row:
            rows = rows.group_by(REQUEST).agg(
                pl.col(SCORE).count().alias("n"), pl.all().exclude(CANDIDATE, SCORE).first()
            )
        else:
            rows = rows.with_columns(pl.col(CANDIDATES).list.len().alias("n"))
        found = rows.select(
            pl.len().alias("requests"),
            pl.col(REQUEST).n_unique().alias("names"),
            pl.col("n").sum().alias("candidates"),
            *((pl.col(HISTORY) == kind).sum().alias(kind) for kind in (STORED, ENCODED, EMPTY)),
            pl.col(UNKNOWN).sum(),
            pl.col(MISSING).sum(),
        ).collect()
    except pl.exceptions.PolarsError as error:
        raise unreadable(scoring, error) from error
    row = found.row(0, named=True)
    if not row["requests"] == row.pop("names") == scoring.count:
        raise RequestError(
            f"{scoring.output} holds {row['requests']:,} requests, {scoring.count:,} were asked: "
            "remove it and score again"
        )
    return Summary(**row)


def report(settings: ScoreSettings, summary: Summary, seconds: float) -> str:
    """Say what was made, where it lies and what to run next."""
    output = Path(settings.output)
    lines = [
        f"{shown(output)}: {summary.requests:,} requests, {summary.candidates:,} candidates "
        f"in {seconds:.1f} s, each request once",
        f"histories: {summary.stored:,} requests from the store, {summary.encoded:,} encoded, "
        f"{summary.empty:,} empty",
    ]
    if summary.unknown_candidates or summary.missing_context:
        lines.append(
            f"flagged: {summary.unknown_candidates:,} unknown candidates, "
            f"{summary.missing_context:,} candidates with context missing"
        )
    command = f"{python_script('score_batch.py')} --output {shown(output)} --verify"
    return "\n".join([*lines, f"next: {command}  (counts it again)"])


def main(arguments: list[str] | None = None) -> int:
    """Parse, score, report; what cannot be scored ends with one line and exit code 2."""
    start = time.perf_counter()
    try:
        settings = parse(ScoreSettings, arguments, __doc__)
        summary = score(settings)
    except (SettingsError, DataError, BundleError, StoreError, RequestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    print(report(settings, summary, time.perf_counter() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
