"""Past behaviours from files into the log: exactly once, and begun again where it was stopped."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from hashtab.features.sources import microseconds
from hashtab.serving.bse.applying import Outcome
from hashtab.serving.bse.messages import LATEST_US, iso
from hashtab.serving.bse.writer import Writer
from hashtab.serving.errors import RequestError
from hashtab.serving.store import Event, TableStore

_ROWS = 5_000  # of one change
_UNITS = ("s", "ms", "us")


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """Files of behaviours and what their columns mean.

    Args:
        files: a CSV or Parquet file, a folder of such, or a glob.
        user: column.
        item: column.
        time: column of times, UTC where they name no zone, or of whole numbers since 1970.
        time_unit: of whole numbers: s, ms or us; must be given for them.
        id: column of event ids; by default an event is named by its user, item, time and by how
            many like it came before, so that the same files come to the same ids.
        side: columns of side features.
    """

    files: str
    user: str
    item: str
    time: str
    time_unit: str | None = None
    id: str | None = None
    side: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.time_unit not in (None, *_UNITS):
            raise RequestError(f"time_unit must be s, ms or us, got {self.time_unit!r}")

    @property
    def columns(self) -> list[str]:
        """All columns that are read."""
        return [self.user, self.item, self.time, *([self.id] if self.id else []), *self.side]


def replay(settings: ReplaySettings, store: TableStore) -> dict[Outcome, int]:
    """Write the events of files and return what became of them; those of an earlier run are done.

    Rows are taken user by user, so that a user's tables are written about once. How far it came is
    kept in the store, in the change that writes the events.

    Raises:
        RequestError: if a file cannot be read, lacks a column or holds a row that is no event.
        StoreError: if the store cannot be written.
    """
    frame = _frame(settings)
    if len(frame):
        first, last = (iso(frame["_time"].sort()[end]) for end in (0, -1))
        print(f"{len(frame):,} behaviours from {first} to {last}", file=sys.stderr)
    writer = Writer(store)
    _check_users(settings, frame, writer)
    name = _name(settings, frame)
    with store.reading() as log:
        done = int(log.value(name) or 0)
    found = dict.fromkeys(Outcome, 0)
    progress = tqdm(total=len(frame), initial=done, unit="event", file=sys.stderr)
    for start, events in _changes(settings, frame, done):
        offset = {name: str(start + len(events)).encode()}
        for outcome in writer.write(events, offset):
            found[outcome] += 1
        progress.update(len(events))
    progress.close()
    return found


def _frame(settings: ReplaySettings) -> pl.DataFrame:
    """Read all rows, in the order of users and times, with `_id` and `_time`."""
    paths = _paths(settings.files)
    try:
        csv = paths[0].suffix == ".csv"
        rows = pl.scan_csv(paths, try_parse_dates=True) if csv else pl.scan_parquet(paths)
        lacking = set(settings.columns) - set(rows.collect_schema().names())
        if lacking:
            raise RequestError(
                f"{settings.files} has no column {', '.join(sorted(lacking))}; it has "
                f"{', '.join(rows.collect_schema().names())}"
            )
        frame = rows.select(settings.columns).collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"{settings.files} cannot be read: {reason}") from error
    frame = frame.with_columns(
        _time(settings, frame).alias("_time"), *(_side(frame[name]) for name in settings.side)
    )
    _check(settings, frame)
    key = [settings.user, settings.item, "_time"]
    event_id = (
        pl.col(settings.id).cast(pl.String)
        if settings.id
        else pl.format("{}/{}/{}", settings.item, "_time", pl.int_range(pl.len()).over(key))
    )
    return frame.with_columns(event_id.alias("_id")).sort(settings.user, "_time", "_id")


def _paths(files: str) -> list[Path]:
    path = Path(files)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in (".csv", ".parquet"))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(path.parent.glob(path.name))
    if not found:
        raise RequestError(f"no file matches {files}; it may be a file, a folder or a glob")
    if {p.suffix for p in found} not in ({".csv"}, {".parquet"}):
        raise RequestError(f"{files} must be CSV files or Parquet files, and not both")
    return found


def _time(settings: ReplaySettings, frame: pl.DataFrame) -> pl.Expr:
    """Return times in microseconds, null where there is none."""
    dtype = frame[settings.time].dtype
    if not (isinstance(dtype, pl.Datetime) or dtype == pl.Date or dtype.is_integer()):
        raise RequestError(
            f"column {settings.time!r} must hold times or whole numbers, got {dtype}"
        )
    if dtype.is_integer() and settings.time_unit is None:
        raise RequestError(
            f"column {settings.time!r} holds whole numbers: say by --time-unit whether they count "
            "s, ms or us since 1970"
        )
    return microseconds(settings.time, dtype, settings.time_unit)


def _check_users(settings: ReplaySettings, frame: pl.DataFrame, writer: Writer) -> None:
    for model in writer.models(writer.store.plan()).values():
        if model.text_users != (frame[settings.user].dtype == pl.String):
            wanted = "text" if model.text_users else "whole numbers"
            raise RequestError(
                f"column {settings.user!r} holds {frame[settings.user].dtype}, the models whose "
                f"tables {writer.store.name} keeps know users as {wanted}: cast it"
            )


def _side(column: pl.Series) -> pl.Series:
    """Return values as JSON has them: numbers as they are, all else as text."""
    if column.dtype.is_decimal():
        return column.cast(pl.Float64)
    return column if column.dtype.is_numeric() else column.cast(pl.String)


def _check(settings: ReplaySettings, frame: pl.DataFrame) -> None:
    for column in (settings.user, settings.item, "_time", *([settings.id] if settings.id else [])):
        bad = frame[column].is_null().arg_true()
        if len(bad):
            name = settings.time if column == "_time" else column
            raise RequestError(
                f"row {bad[0] + 1} of {settings.files} has no {name} that can be read "
                f"({len(bad):,} such rows): fill or remove them"
            )
    outside = (frame["_time"].abs() > LATEST_US).arg_true()
    if len(outside):
        raise RequestError(
            f"row {outside[0] + 1} of {settings.files} has a {settings.time} beyond the "
            f"year 2255 in {settings.time_unit}: check --time-unit"
        )
    for column in (settings.user, settings.item):
        dtype = frame[column].dtype
        if not (dtype.is_integer() or dtype == pl.String):
            raise RequestError(f"column {column!r} must hold whole numbers or text, got {dtype}")


def _name(settings: ReplaySettings, frame: pl.DataFrame) -> str:
    """Return the name of this replay: the same rows read in the same way have the same."""
    digest = hashlib.sha256(repr(sorted(asdict(settings).items())).encode())
    digest.update(frame.hash_rows(seed=0).to_numpy().tobytes())
    return f"replay {digest.hexdigest()[:32]}"


def _changes(
    settings: ReplaySettings, frame: pl.DataFrame, done: int
) -> Iterator[tuple[int, list[Event]]]:
    for start in range(done, len(frame), _ROWS):
        some = frame.slice(start, _ROWS)
        columns: list[list[Any]] = [
            some[name].to_list() for name in (settings.user, "_id", "_time", settings.item)
        ]
        side = (
            some.select(settings.side).to_dicts()
            if settings.side
            else [{} for _ in range(len(some))]
        )
        yield (
            start,
            [
                Event(user=user, id=event_id, time=time, item=item, side=values)
                for user, event_id, time, item, values in zip(*columns, side, strict=True)
            ],
        )
