"""The tables that all shards share: users, the item catalogue, encoders and the exposure pool."""

import hashlib
from pathlib import Path

import polars as pl

from hashtab.features import encoders, sources
from hashtab.features.encoders import Encoder
from hashtab.features.schema import Pool, Schema
from hashtab.features.sources import ITEM, SPLIT, USER
from hashtab.features.storage import write_arrow, write_text

# Columns of our own begin with "_", features never do, so that none can take the place of another.
ROW, INDEX, HASH, KEY, CODE = "_row", "_index", "_hash", "_key", "_code"


def write_tables(schema: Schema, folder: Path) -> None:
    """Write users and catalogue to `tables/`; encoders and the pool, if declared, to `work/`.

    Does nothing where they are complete. Encoders learn from rows of training time only; catalogue
    rows and user indices are in the order of the values, so that no order of the input shows. The
    numeric features of a log are learned later, by `write_statistics`.
    """
    if (folder / "work" / "encoders.json").exists():  # written last
        return
    behaviours = sources.behaviours(schema)
    requests = sources.read_log(schema, sources.requests_log(schema))
    logs = [behaviours] if schema.exposures is None else [behaviours, requests]
    trained = pl.concat([_distinct(_training(log), ITEM) for log in logs]).unique()
    write_arrow(folder / "tables" / "users.arrow", _users(logs))
    items, learned = _catalogue(schema, logs, trained)
    write_arrow(folder / "tables" / "catalogue.arrow", items)
    learned |= _log_vocabularies(schema, behaviours, requests)
    if schema.pool is not None:
        learned |= _write_pool(schema.pool, behaviours, items, trained, folder / "work")
    write_text(folder / "work" / "encoders.json", encoders.to_json(learned))


def _users(logs: list[pl.LazyFrame]) -> pl.DataFrame:
    users = pl.concat([_distinct(log, USER) for log in logs]).unique().sort()
    hashes = pl.Series(HASH, [stable_hash(user) for user in users.to_list()], dtype=pl.UInt64)
    return pl.DataFrame([users, hashes]).with_row_index(INDEX).cast({INDEX: pl.Int64})


def stable_hash(value: int | str) -> int:
    """A 64-bit hash that is the same on every machine and in every version."""
    digest = hashlib.blake2b(str(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _distinct(log: pl.LazyFrame, column: str) -> pl.Series:
    return log.select(column).unique().collect(engine="streaming").to_series()


def _catalogue(
    schema: Schema, logs: list[pl.LazyFrame], trained: pl.Series
) -> tuple[pl.DataFrame, dict[str, Encoder]]:
    seen = pl.concat([_distinct(log, ITEM) for log in logs])
    described = sources.items(schema)
    features = None if described is None else described.collect(engine="streaming")
    every = seen if features is None else pl.concat([seen, features[ITEM]])
    catalogue = pl.DataFrame([every.unique().sort()])
    if features is not None:
        catalogue = catalogue.join(features, on=ITEM, how="left", maintain_order="left")
    known = catalogue.filter(pl.col(ITEM).is_in(trained.implode()))
    learned = {schema.item_name: encoders.fit("categorical", trained)}
    for kind, names in (("categorical", schema.item_categorical), ("numeric", schema.item_numeric)):
        learned |= {name: encoders.fit(kind, known[name]) for name in names}
    encoded = {
        name: learned[name].encode(pl.col(name)) for name in learned if name != schema.item_name
    }
    columns = {schema.item_name: learned[schema.item_name].encode(pl.col(ITEM)), **encoded}
    return catalogue.select(ITEM, **columns), learned


def _training(log: pl.LazyFrame) -> pl.LazyFrame:
    return log.filter(pl.col(SPLIT) == 0)


def _log_vocabularies(
    schema: Schema, behaviours: pl.LazyFrame, requests: pl.LazyFrame
) -> dict[str, Encoder]:
    """One vocabulary a name, over all training rows in which the name appears."""
    values: dict[str, list[pl.Series]] = {}
    for names, log in (
        (schema.side_categorical, behaviours),
        (schema.context.categorical, requests),
    ):
        for name in names:
            values.setdefault(name, []).append(_distinct(_training(log), name))
    return {name: encoders.fit("categorical", pl.concat(parts)) for name, parts in values.items()}


def _write_pool(
    declared: Pool,
    behaviours: pl.LazyFrame,
    items: pl.DataFrame,
    trained: pl.Series,
    folder: Path,
) -> dict[str, Encoder]:
    """Write the pool as one sorted array of codes: key times catalogue length plus catalogue row.

    Only keys of the log and items with behaviours in training time are kept, which is what makes
    it small enough to hold; a key's item that is listed twice keeps its first context in order.
    """
    keys = (
        behaviours.group_by(declared.on)
        .agg((pl.col(SPLIT).min() == 0).alias(SPLIT))
        .collect(engine="streaming")
        .sort(declared.on)
        .with_row_index(KEY)
        .cast({KEY: pl.Int64})
    )
    rows = items.with_row_index(ROW).filter(pl.col(ITEM).is_in(trained.implode()))
    code = pl.col(KEY) * items.height + pl.col(ROW)
    names = [*declared.categorical, *declared.numeric]
    shown = (
        sources.pool(declared)
        .join(keys.lazy(), on=declared.on)
        .join(rows.lazy().select(ITEM, ROW), on=ITEM)
        .select(code.alias(CODE), SPLIT, *names)
        .collect(engine="streaming")
    )
    learned = {
        name: encoders.fit(kind, shown.filter(SPLIT)[name])
        for kind in ("categorical", "numeric")
        for name in getattr(declared, kind)
    }
    encoded = (
        shown.select(CODE, **{name: learned[name].encode(pl.col(name)) for name in names})
        .sort(CODE, *names)
        .filter(pl.col(CODE) != pl.col(CODE).shift(1).fill_null(-1))
    )
    row = (encoded[CODE] % items.height).cast(pl.Int32).alias(ROW)
    write_arrow(folder / "pool_keys.arrow", keys.drop(SPLIT))
    write_arrow(folder / "pool.arrow", encoded.with_columns(row))
    return learned
