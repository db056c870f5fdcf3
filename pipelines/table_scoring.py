"""Scores one part of a table after another, each part written whole or not at all."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from hashtab.features.plain import did_you_mean
from hashtab.features.sources import SourceFile
from hashtab.pipelines.outputs import Job, write_durably
from hashtab.pipelines.table_data import as_served, csv_types
from hashtab.pipelines.table_files import NULLS, find_files, hashes, one_line, scan
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.table_bundle import TableBundle
from hashtab.serving.table_manifest import TableManifest

ROW, PREDICTION, PROBABILITY, QUANTILE = "row", "prediction", "probability", "quantile"
_WHAT = "rows"


@dataclass(frozen=True, kw_only=True)
class RowFiles:
    """Files with the rows of a table, all of one form.

    Args:
        paths: CSV or Parquet, in order.
        manifest: of the model that reads them.
        keep: columns passed through.
        ignored: columns that no one reads.
    """

    paths: tuple[Path, ...]
    manifest: TableManifest
    keep: tuple[str, ...]
    ignored: tuple[str, ...]

    @classmethod
    def find(cls, pattern: str, manifest: TableManifest, keep: tuple[str, ...]) -> "RowFiles":
        """Find files by a path, a folder or a glob, and check their columns.

        Raises:
            RequestError: if there is none, or a file lacks a column.
        """
        paths = find_files(pattern, _WHAT)
        there = scan(paths, csv_types(manifest.columns), _WHAT, NULLS).collect_schema().names()
        read = [column.name for column in manifest.columns]
        for names, why in ((read, "which the model reads"), (keep, "which --keep names")):
            for name in names:
                if name not in there:
                    hint = did_you_mean(name, there)
                    raise RequestError(f"{paths[0]} has no column {name!r}, {why}{hint}")
        made = {ROW, PREDICTION, *_output_names(manifest)}
        if made & set(keep):
            raise RequestError(f"--keep {sorted(made & set(keep))}: the scores have these columns")
        ignored = tuple(name for name in there if name not in {*read, *keep})
        return cls(paths=paths, manifest=manifest, keep=keep, ignored=ignored)

    def hashes(self) -> list[SourceFile]:
        """Return name, size and sha256 of each file."""
        return hashes(self.paths)

    def write(self, target: Path, rows_per_group: int) -> int:
        """Write all rows as Parquet, as the model reads them, in slices that fit in memory.

        A column that is both read and kept stands twice: what is kept stays as it was.

        Returns:
            The number of rows.

        Raises:
            RequestError: if a file cannot be read to its end.
        """
        frame = scan(self.paths, csv_types(self.manifest.columns), _WHAT, NULLS)
        schema = frame.collect_schema()
        read = [as_served(c, schema[c.name]).alias(c.name) for c in self.manifest.columns]
        frame = frame.select(*read, *(pl.col(name).alias(_kept(name)) for name in self.keep))
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            frame.sink_parquet(temporary, row_group_size=rows_per_group)
        except pl.exceptions.PolarsError as error:
            raise RequestError(
                f"{_WHAT} {self.paths[0]} cannot be read: {one_line(error)}"
            ) from error
        temporary.replace(target)
        return int(pl.scan_parquet(target).select(pl.len()).collect().item())


def _kept(name: str) -> str:
    return f"_keep_{name}"


@dataclass(frozen=True, kw_only=True)
class TableScoring(Job):
    """One job of a table's rows.

    Args:
        keep: columns passed through.
    """

    keep: tuple[str, ...]

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the scores; the bundle may have moved."""
        names = ("bundle_digest", "requests", "rows", "keep")
        return {name: getattr(self, name) for name in names}

    def __call__(self, number: int) -> list[str]:
        """Score one part; does nothing where its file is there.

        Raises:
            BundleError: if this process sees another bundle than the job's.
            RequestError: if a value is none that its column takes.
        """
        if not self.part(number).exists():
            scores = self.score(self.requests_of(number), number * self.rows)
            write_durably(self.part(number), scores)
        return []

    def score(self, rows: pl.DataFrame, first: int) -> pl.DataFrame:
        """Return the scores of rows, in their order, the first of which has a number."""
        bundle = _open(self.bundle, self.bundle_digest)
        outputs = bundle.raw(rows)
        numbers = pl.int_range(first, first + len(rows), dtype=pl.Int64, eager=True).alias(ROW)
        kept = [rows[_kept(name)].alias(name) for name in self.keep]
        names = _output_names(bundle.manifest)
        columns = outputs.reshape(len(rows), len(names)).T
        each = [pl.Series(name, column) for name, column in zip(names, columns, strict=True)]
        if bundle.manifest.classes:
            each.insert(0, pl.Series(PREDICTION, bundle.labels).gather(outputs.argmax(1)))
        return pl.DataFrame([numbers, *kept, *each])


def _output_names(manifest: TableManifest) -> list[str]:
    """Return what the outputs of the graph are called."""
    if manifest.classes:
        return [f"{PROBABILITY}_{label}" for label in manifest.classes]
    return [f"{QUANTILE}_{share}" for share in manifest.quantiles] or [PREDICTION]


@lru_cache(maxsize=2)
def _open(folder: str, digest: str) -> TableBundle:
    bundle = TableBundle.open(folder)
    if bundle.manifest.digest != digest:
        raise BundleError(f"{folder} holds another bundle than when the scoring began")
    return bundle
