"""One streaming pass over each log: rows become ids and go to the shard of their user."""

import shutil
from pathlib import Path

import polars as pl

from hashtab.features import encoders, sources
from hashtab.features.schema import Schema
from hashtab.features.sources import EVENT, ITEM, LABEL, PERIOD, SESSION, SPLIT, TIME, USER
from hashtab.features.tables import HASH, INDEX, KEY, ROW

SHARD = "_shard"


def partition(schema: Schema, folder: Path, shards: int) -> None:
    """Write `work/behaviours` and, where declared, `work/exposures`: a folder for each shard."""
    _write(schema, sources.behaviours(schema), folder, "behaviours", shards)
    if schema.exposures is not None:
        _write(schema, sources.read_log(schema, schema.exposures), folder, "exposures", shards)


def _write(schema: Schema, log: pl.LazyFrame, folder: Path, name: str, shards: int) -> None:
    target, temporary = folder / "work" / name, folder / "work" / f".{name}.tmp"
    if target.exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # File names say nothing: a shard sorts its rows by all columns.
    _encode(schema, log, folder, shards).sink_ipc(
        pl.PartitionBy(temporary, key=SHARD, include_key=False), maintain_order=False
    )
    temporary.rename(target)


def _encode(schema: Schema, log: pl.LazyFrame, folder: Path, shards: int) -> pl.LazyFrame:
    learned = encoders.load(folder / "work" / "encoders.json")
    users = pl.scan_ipc(folder / "tables" / "users.arrow")
    items = pl.scan_ipc(folder / "tables" / "catalogue.arrow").select(ITEM).with_row_index(ROW)
    joined = log.join(users, on=USER).join(items, on=ITEM)
    columns = joined.collect_schema().names()
    if schema.pool is not None:
        joined = joined.join(
            pl.scan_ipc(folder / "work" / "pool_keys.arrow"), on=schema.pool.on, how="left"
        )
        columns.append(KEY)
    kept = [c for c in (INDEX, TIME, SPLIT, EVENT, LABEL, SESSION, PERIOD, KEY) if c in columns]
    named = (*schema.context.categorical, *schema.context.numeric)
    named += (*schema.side_categorical, *schema.side_numeric)
    # What is numeric stays as it is until its scale is learned.
    features = {
        name: learned[name].encode(pl.col(name))
        if name in learned
        else pl.col(name).cast(pl.Float64)
        for name in dict.fromkeys(named)
        if name in columns
    }
    return joined.select(
        *kept,
        pl.col(ROW).cast(pl.Int32),
        (pl.col(HASH) % shards).cast(pl.Int32).alias(SHARD),
        **features,
    )


def read_rows(folder: Path, name: str, shard: int) -> pl.DataFrame:
    """Return a shard's rows of one log in no particular order, duplicates included."""
    log = folder / "work" / name
    files = sorted((log / f"{SHARD}={shard}").glob("*"))
    if files:
        return pl.concat([pl.read_ipc(file) for file in files])
    return pl.read_ipc(next(log.glob("*/*"))).clear()
