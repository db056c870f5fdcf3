"""Prepared data read back with raw values, so that data sets can be compared by meaning."""

from pathlib import Path

import polars as pl

from hashtab.features.prepare import prepare
from hashtab.features.schema import Schema


def build(schema: Schema, folder: Path, shards: int = 3) -> Path:
    prepare(schema, folder, shards=shards)
    return folder


def samples(folder: Path, split: str) -> pl.DataFrame:
    """Samples with raw users and items in a total order."""
    stored = pl.concat(
        [pl.read_ipc(path) for path in sorted((folder / "samples" / split).glob("*"))]
    )
    return _raw(folder, stored)


def histories(folder: Path) -> pl.DataFrame:
    """Behaviours with raw users and items, in stored order within a user."""
    parts = []
    for path in sorted((folder / "histories").glob("*")):
        users = pl.read_ipc(folder / "users" / path.name)
        lengths = users["history_end"].diff().fill_null(users["history_end"].first())
        owner = users["_index"].repeat_by(lengths).explode(empty_as_null=False)
        parts.append(pl.read_ipc(path).with_columns(owner.alias("_index")))
    return _raw(folder, pl.concat(parts), ordered=False)


def _raw(folder: Path, frame: pl.DataFrame, ordered: bool = True) -> pl.DataFrame:
    users = pl.read_ipc(folder / "tables" / "users.arrow")["_user"]
    items = pl.read_ipc(folder / "tables" / "catalogue.arrow")["_item"]
    raw = frame.with_columns(_user=users.gather(frame["_index"]), _item=items.gather(frame["_row"]))
    raw = raw.drop("_index", "_row").rename(lambda name: name.removeprefix("_"))
    return raw.sort(sorted(raw.columns)) if ordered else raw


def catalogue(folder: Path) -> pl.DataFrame:
    """Items with their encoded features and their popularity."""
    tables = [pl.read_ipc(folder / "tables" / f"{n}.arrow") for n in ("catalogue", "popularity")]
    return pl.concat(tables, how="horizontal")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
