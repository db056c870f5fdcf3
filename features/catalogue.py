"""The items that are known: from an item's value to its features, the same code everywhere."""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from hashtab.features.encoders import UNKNOWN_ID
from hashtab.features.sources import ITEM
from hashtab.features.storage import Array, map_arrow

UNKNOWN_ROW = -1


class Catalogue:
    """Items by row. Row -1 is an unknown item: id 1 in each categorical feature, else 0.

    Args:
        items: values of the items, ascending.
        features: name -> `[items]`, int32 ids or float32.
        item_name: name of the feature that is the item itself.
    """

    def __init__(self, items: pl.Series, features: dict[str, Array], item_name: str) -> None:
        self.items = items
        self.item_name = item_name
        # The unknown item is the last row, which is what index -1 means.
        self.features = {
            name: np.append(column, column.dtype.type(UNKNOWN_ID * (column.dtype.kind == "i")))
            for name, column in features.items()
        }

    @classmethod
    def read(cls, path: Path, item_name: str) -> Self:
        """Read `catalogue.arrow` as preparation writes it."""
        columns = map_arrow(path)
        items = pl.read_ipc(path, columns=[ITEM])[ITEM]
        return cls(items, {k: v for k, v in columns.items() if k != ITEM}, item_name)

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, items: pl.Series) -> NDArray[np.int64]:
        """Return the row of each item, -1 where it is unknown or null."""
        if items.dtype.is_float() and self.items.dtype.is_integer():
            items = items.set(items != items.floor(), None)  # 7.5 is not item 7
        wanted = items.cast(self.items.dtype, strict=False)
        found = (
            self.items.search_sorted(wanted.fill_null(self.items[0])).to_numpy().astype(np.int64)
        )
        found = np.minimum(found, len(self.items) - 1)
        known = (self.items.gather(found) == wanted).fill_null(False).to_numpy()
        return np.where(known, found, UNKNOWN_ROW)

    def columns(self, rows: Array, names: Iterable[str]) -> dict[str, Array]:
        """Return the named features of rows `[...]`, each `[...]`."""
        return {name: self.features[name][rows] for name in names}

    def counted(self, name: str) -> NDArray[np.int64]:
        """What a counter counts, by row: the item itself or the id of its feature.

        Two items of unknown type are not of one type: 0 stands for a value that was never met.
        """
        if name == self.item_name:
            return np.append(np.arange(1, len(self.items) + 1), 0)
        ids = self.features[name].astype(np.int64)
        return np.where(ids == UNKNOWN_ID, 0, ids)
