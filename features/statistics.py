"""What only all training rows together tell: popularity, first times, scales of numeric columns.

The rows are read shard by shard, so that a log need not fit in memory, and an event that was
delivered twice, whose copies lie in the shard of their user, counts once.
"""

from pathlib import Path

import numpy as np
import polars as pl

from hashtab.features import encoders
from hashtab.features.encoders import Moments, Scaler
from hashtab.features.partition import read_rows
from hashtab.features.schema import Schema
from hashtab.features.sources import SPLIT, TIME
from hashtab.features.storage import Array, frame_of, map_arrow, write_arrow, write_text
from hashtab.features.tables import ROW

TRAIN_COUNT, FIRST_TIME, UNTIL = "_train_count", "_first_time", "_until"


def write_statistics(schema: Schema, folder: Path, shards: int) -> None:
    """Write `tables/popularity.arrow`, a row an item, and the finished `tables/encoders.json`.

    Popularity holds the item's behaviours in training time and the first of their times; its
    running total over the pool, if one is declared, goes to `work/`. Does nothing where all are
    there.
    """
    tables = folder / "tables"
    if (tables / "encoders.json").exists():  # written last
        return
    items = pl.scan_ipc(tables / "catalogue.arrow").select(pl.len()).collect().item()
    popularity = _Popularity(items)
    moments: dict[str, Moments] = {}
    for log, names in _numeric_features(schema).items():
        for shard in range(shards):
            rows = read_rows(folder, log, shard).unique().filter(pl.col(SPLIT) == 0)
            if log == "behaviours":
                popularity.add(rows)
            for name in names:
                moments[name] = moments.get(name, Moments()) + Moments.of(rows[name])
    write_arrow(tables / "popularity.arrow", popularity.frame())
    if schema.pool is not None:
        # Once for all shards: the pool is the longest of all tables.
        pool = map_arrow(folder / "work" / "pool.arrow")[ROW]
        write_arrow(folder / "work" / "until.arrow", popularity.running_total(pool))
    learned = encoders.load(folder / "work" / "encoders.json")
    learned |= {name: Scaler.of(found) for name, found in moments.items()}
    write_text(tables / "encoders.json", encoders.to_json(learned))


class _Popularity:
    """Behaviours of each item and the first of their times."""

    def __init__(self, items: int) -> None:
        self._count = np.zeros(items, np.int64)
        self._first = np.full(items, np.iinfo(np.int64).max)

    def add(self, rows: pl.DataFrame) -> None:
        row = rows[ROW].to_numpy()
        self._count += np.bincount(row, minlength=len(self._count))
        np.minimum.at(self._first, row, rows[TIME].to_numpy())

    def running_total(self, rows: Array) -> pl.DataFrame:
        return frame_of({UNTIL: np.cumsum(self._count[rows])})

    def frame(self) -> pl.DataFrame:
        return frame_of({TRAIN_COUNT: self._count, FIRST_TIME: self._first})


def _numeric_features(schema: Schema) -> dict[str, tuple[str, ...]]:
    """Names of the numeric features by the log that holds them."""
    if schema.exposures is None:
        return {"behaviours": tuple(dict.fromkeys((*schema.side_numeric, *schema.context.numeric)))}
    return {"behaviours": schema.side_numeric, "exposures": schema.context.numeric}
