"""CSV and Parquet files that a person names by a path, a folder or a glob."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import polars as pl

from hashtab.features.sources import SourceFile, sha256
from hashtab.serving.errors import RequestError

NULLS = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "null", "NULL", "?")
"""What a value that is missing from a table is called in CSV; "None" and "-" may be categories."""

_PARQUET, _CSV = (".parquet", ".pq"), (".csv", ".csv.gz")


def find_files(pattern: str, what: str) -> tuple[Path, ...]:
    """Return the files of a path, a folder or a glob in sorted order, all of one form.

    Args:
        pattern: that names them.
        what: they hold, for errors.

    Raises:
        RequestError: if there is none, or they are not all CSV or all Parquet.
    """
    path = Path(pattern)
    if path.is_dir():
        found: Iterable[Path] = (p for p in path.iterdir() if _form(p))
    elif path.exists():
        found = [path]
    else:
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        found = anchor.glob(str(path.relative_to(path.anchor)))
    paths = tuple(sorted(found))
    if not paths:
        raise RequestError(f"no {what} in {pattern}: name a CSV or Parquet file, folder or glob")
    for other in paths:
        if not _form(other):
            raise RequestError(
                f"{what} {other}: neither CSV (.csv, .csv.gz) nor Parquet (.parquet)"
            )
    if len({_form(p) for p in paths}) > 1:
        raise RequestError(f"{what} in {pattern} must all be CSV or all be Parquet")
    return paths


def _form(path: Path) -> str | None:
    name = path.name.lower()
    if name.endswith(_PARQUET):
        return "parquet"
    return "csv" if name.endswith(_CSV) else None


def scan(
    paths: Sequence[Path],
    types: Mapping[str, type[pl.DataType]],
    what: str,
    nulls: Sequence[str] = (),
) -> pl.LazyFrame:
    """Scan files of one form.

    Args:
        paths: of the files, at least one.
        types: that columns of a CSV are read as; others are read as the whole file looks.
        what: they hold, for errors.
        nulls: what a CSV calls a missing value; a field that is empty and not quoted is one anyway.

    Raises:
        RequestError: if the first of them cannot be read.
    """
    try:
        if _form(paths[0]) == "csv":
            frame = pl.scan_csv(
                list(paths),
                try_parse_dates=True,
                infer_schema_length=None,  # a file must not be read otherwise for its first rows
                schema_overrides=dict(types),
                null_values=list(nulls) or None,
                glob=False,
            )
        else:
            frame = pl.scan_parquet(list(paths), glob=False)
        frame.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"{what} {paths[0]} cannot be read: {reason}") from error
    return frame


def one_line(error: Exception) -> str:
    """Return the first part of what polars says, in one line."""
    return " ".join(str(error).split("\n\n")[0].split())


def hashes(paths: Iterable[Path]) -> list[SourceFile]:
    """Return name, size and sha256 of each file."""
    return [
        SourceFile(path=path.name, size=path.stat().st_size, sha256=sha256(path)) for path in paths
    ]
