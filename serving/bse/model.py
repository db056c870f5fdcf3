"""A model whose tables are kept: from events with raw values to what its records are made of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from hashtab.features.encoders import Encoder, Vocabulary
from hashtab.features.storage import Array
from hashtab.serving.bundle import Bundle
from hashtab.serving.items import ItemIndex
from hashtab.serving.store import COMPONENT_LIMIT, Event, RecordLayout, SideValue


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Events as a model sees them. L events.

    Args:
        rows: `[L]` int64, catalogue rows, -1 where an item is unknown.
        behaviours: feature -> `[L]`.
        codes: `[L, G]` int32.
        vectors: `[L, D]` int32, fixed point.
        held: `[L]` bool, whether a table can hold the vector.
    """

    rows: NDArray[np.int64]
    behaviours: dict[str, Array]
    codes: NDArray[np.int32]
    vectors: NDArray[np.int32]
    held: NDArray[np.bool_]


class Model:
    """An opened bundle and how it reads events.

    Args:
        bundle: opened.
        items: of the bundle's catalogue, where they are indexed already.
    """

    def __init__(self, bundle: Bundle, items: ItemIndex | None = None) -> None:
        self.bundle = bundle
        self._items = items or ItemIndex(bundle.catalogue)
        self.layout: RecordLayout = bundle.layout
        self.limit = bundle.manifest.history_limit
        manifest = bundle.manifest
        behaviour = manifest.features.behaviour
        self._of_item = [f.name for f in behaviour if f.name in manifest.items]
        self._side = {name: bundle.encoders[name] for name in manifest.side}

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a bundle as `Bundle.open` does.

        Raises:
            BundleError: if it cannot be used.
        """
        return cls(Bundle.open(folder))

    @property
    def fingerprint(self) -> bytes:
        """Of the records."""
        return self.layout.fingerprint

    @property
    def text_users(self) -> bool:
        """Whether users are text, and not integers."""
        return self.bundle.manifest.text_users

    def rows(self, events: Sequence[Event]) -> NDArray[np.int64]:
        """Return the catalogue row of each event's item, -1 where it is unknown."""
        own = str if self.bundle.manifest.text_items else _integer
        return self._items.rows([own(event.item) for event in events])

    def behaviours(self, events: Sequence[Event], rows: NDArray[np.int64]) -> dict[str, Array]:
        """Return each behaviour feature of events, `[L]`."""
        columns = self.bundle.catalogue.columns(rows, self._of_item)
        for name, encoder in self._side.items():
            columns[name] = encode_side([event.side.get(name) for event in events], encoder)
        return columns

    def encode(self, events: Sequence[Event]) -> Encoded:
        """Return events as a model sees them."""
        rows = self.rows(events)
        behaviours = self.behaviours(events, rows)
        codes = np.zeros((len(events), self.layout.groups), np.int32)
        vectors = np.zeros((len(events), self.layout.size), np.int32)
        if events and self.layout.groups:
            _, codes, vectors = self.bundle.encode(behaviours)
        held = np.abs(vectors).max(axis=1, initial=0) < COMPONENT_LIMIT - 1
        return Encoded(rows=rows, behaviours=behaviours, codes=codes, vectors=vectors, held=held)


def encode_side(values: Sequence[SideValue], encoder: Encoder) -> Array:
    """Encode raw values of one side feature, as preparation encodes a column of them."""
    if isinstance(encoder, Vocabulary):
        text = [None if value is None else str(value) for value in values]
        column = pl.Series("value", text, dtype=pl.String)
    else:
        numbers = [None if isinstance(value, str) else value for value in values]
        column = pl.Series("value", numbers, dtype=pl.Float64)
    encoded: Array = (
        column.to_frame().select(encoder.encode(pl.col("value"))).to_series().to_numpy()
    )
    return encoded


def _integer(item: int | str) -> int | None:
    if isinstance(item, str):
        if not re.fullmatch("-?[0-9]{1,19}", item):
            return None
        item = int(item)
    return item if -(2**63) <= item < 2**63 else None
