"""The behaviours of a prepared data set as a file of raw events, for the log of the BSE service."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from hashtab.features import encoders
from hashtab.features.encoders import FIRST_ID, Encoder, Vocabulary
from hashtab.features.histories import HistoryReader
from hashtab.features.storage import Array

USER_COLUMN, ITEM_COLUMN, TIME_COLUMN = "user", "item", "time"


def write_events(data: Path, target: Path) -> tuple[str, ...]:
    """Write every behaviour of a data set to a Parquet file, with its values as they were logged.

    Numeric side features are rounded to float32 on the way.

    Args:
        data: folder of the prepared data set.
        target: file.

    Returns:
        The names of the side features, columns of the file beside user, item and time.

    Raises:
        DataError: if the data set is not finished.
    """
    reader = HistoryReader(data)
    stored = encoders.load(data / "tables" / "encoders.json")
    side = {name: stored[name] for name in reader.manifest.schema.side}
    shards = [_shard(reader, number, side) for number in range(reader.manifest.shards)]
    partial = target.with_suffix(".tmp")
    pl.concat(shards).write_parquet(partial)
    partial.rename(target)
    return tuple(side)


def _shard(reader: HistoryReader, number: int, side: Mapping[str, Encoder]) -> pl.DataFrame:
    histories = reader.shard(number)
    user = np.repeat(np.arange(len(histories)), histories.ends - histories.starts)
    columns = {
        USER_COLUMN: histories.users.gather(user),
        ITEM_COLUMN: reader.catalogue.items.gather(histories.rows),
        TIME_COLUMN: pl.Series(histories.times),
    }
    raw = {name: _raw(histories.side[name], encoder) for name, encoder in side.items()}
    return pl.DataFrame(columns | raw)


def _raw(column: Array, encoder: Encoder) -> pl.Series:
    """Turn ids or scaled numbers back into values; what was unknown is null."""
    if isinstance(encoder, Vocabulary):
        values = pl.Series([None] * FIRST_ID + list(encoder.values))
        return values.gather(column)
    return pl.Series(column.astype(np.float64) * encoder.std + encoder.mean)
