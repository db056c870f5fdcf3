"""Names of items for people to read, from a file; no score depends on them."""

from pathlib import Path

import polars as pl

from hashtab.serving.http import SettingsError

ITEM, NAME = "item", "name"

Names = dict[str, str]
"""By the item written as text, so that they hold for every model's catalogue."""


def read_names(path: str | Path) -> Names:
    """Read names of items from CSV or Parquet with the columns `item` and `name`.

    Items or names that are missing are left out; of an item that comes twice, the last name holds.

    Raises:
        SettingsError: if the file cannot be read, lacks a column, or its items are neither whole
            numbers nor text.
    """
    path = Path(path)
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            frame = pl.read_parquet(path)
        else:
            frame = pl.read_csv(path, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SettingsError(f"names {path} cannot be read as CSV or Parquet: {reason}") from error
    for column in (ITEM, NAME):
        if column not in frame.columns:
            raise SettingsError(
                f"names {path} has no column {column!r}, it has {frame.columns}: name the columns "
                f"{ITEM!r} and {NAME!r}"
            )
    kind = frame[ITEM].dtype
    if not (kind.is_integer() or kind == pl.String):
        raise SettingsError(f"items of names {path} must be whole numbers or text, not {kind}")
    known = frame.select(pl.col(ITEM, NAME).cast(pl.String)).drop_nulls()
    return dict(zip(known[ITEM].to_list(), known[NAME].to_list(), strict=True))
