"""What only all training rows together tell: popularity, first times, scales of numeric columns.

The rows are read shard by shard, so that a log need not fit in memory, and an event that was
delivered twice, whose copies lie in the shard of their user, counts once.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from hashtab.features import encoders
from hashtab.features.partition import read_rows
from hashtab.features.schema import Schema
from hashtab.features.sources import SPLIT, TIME
from hashtab.features.storage import frame_of, write_arrow, write_text
from hashtab.features.tables import ROW

TRAIN_COUNT, FIRST_TIME = "_train_count", "_first_time"


def write_statistics(schema: Schema, folder: Path, shards: int) -> None:
    """Write `tables/popularity.arrow`, a row an item, and the finished `tables/encoders.json`.

    Popularity holds the item's behaviours in training time and the first of their times. Does
    nothing where both are there.
    """
    if (folder / "tables" / "encoders.json").exists():  # written last
        return
    write_arrow(folder / "tables" / "popularity.arrow", _popularity(folder, shards))
    learned = encoders.load(folder / "work" / "encoders.json")
    for name, logs in _numeric_features(schema).items():
        parts = (rows[name] for log in logs for rows in _training_rows(folder, log, shards))
        learned[name] = encoders.fit("numeric", parts)
    write_text(folder / "tables" / "encoders.json", encoders.to_json(learned))


def _popularity(folder: Path, shards: int) -> pl.DataFrame:
    items = pl.scan_ipc(folder / "tables" / "catalogue.arrow").select(pl.len()).collect().item()
    count, first = np.zeros(items, np.int64), np.full(items, np.iinfo(np.int64).max)
    for rows in _training_rows(folder, "behaviours", shards):
        row = rows[ROW].to_numpy()
        count += np.bincount(row, minlength=items)
        np.minimum.at(first, row, rows[TIME].to_numpy())
    return frame_of({TRAIN_COUNT: count, FIRST_TIME: first})


def _numeric_features(schema: Schema) -> dict[str, list[str]]:
    """Numeric features of the logs, each with the logs in which its name appears."""
    requests = "behaviours" if schema.exposures is None else "exposures"
    places = [(name, "behaviours") for name in schema.side_numeric]
    places += [(name, requests) for name in schema.context.numeric]
    found: dict[str, list[str]] = {}
    for name, log in dict.fromkeys(places):
        found.setdefault(name, []).append(log)
    return found


def _training_rows(folder: Path, log: str, shards: int) -> Iterator[pl.DataFrame]:
    for shard in range(shards):
        yield read_rows(folder, log, shard).unique().filter(pl.col(SPLIT) == 0)
