"""Models of any layout without a bundle on disk: what they encode is drawn at random once."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from hashtab.serving.bse.model import Encoded, Model
from hashtab.serving.bundle import Bundle
from hashtab.serving.store import COMPONENT_LIMIT, Event, RecordLayout, sum_by_bucket

ITEMS = 20  # that are known, from 0 on
_FEATURES = ("item", "int32"), ("price", "float32")


class _MadeUpBundle(Bundle):
    """The part of a bundle that records are made with."""

    def __init__(self, layout: RecordLayout, limit: int | None, largest: int) -> None:
        self.layout = layout
        self.manifest: Any = SimpleNamespace(history_limit=limit)
        random = np.random.default_rng(5)
        self.codes = random.integers(0, max(layout.buckets, 1), (ITEMS + 1, layout.groups))
        self.vectors = random.integers(-largest, largest + 1, (ITEMS + 1, layout.size))
        self._values = np.append(random.integers(0, 6, ITEMS), 0)

    def counted(self, name: str) -> np.ndarray[Any, Any]:  # noqa: ARG002  the same of all
        return self._values

    def increments(self, behaviours: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        rows = behaviours["row"]
        if not self.layout.groups:
            return np.zeros(self.layout.shape, np.int64)
        vectors = self.vectors[rows].astype(np.int32)
        return sum_by_bucket(self.codes[rows], vectors, self.layout.buckets)


class MadeUpModel(Model):
    """A model of a layout.

    Args:
        fingerprint: of it.
        limit: behaviours of a table.
        largest: component of its vectors.
        layout: what differs from 3 groups of 4 buckets, 5 recent behaviours and one counter.
    """

    def __init__(
        self, fingerprint: bytes, limit: int | None = 7, largest: int = 1 << 20, **layout: Any
    ) -> None:
        given = {"groups": 3, "buckets": 4, "size": 2, "recent": 5, "counters": ("item",)}
        self.layout = RecordLayout(
            fingerprint=fingerprint, **{"features": _FEATURES, **given, **layout}
        )
        self.limit = limit
        self.made_up = _MadeUpBundle(self.layout, limit, largest)
        self.bundle = self.made_up

    def rows(self, events: Sequence[Event]) -> np.ndarray[Any, Any]:
        known = [int(e.item) if 0 <= int(e.item) < ITEMS else -1 for e in events]
        return np.array(known, np.int64)

    def behaviours(
        self, events: Sequence[Event], rows: np.ndarray[Any, Any]
    ) -> dict[str, np.ndarray[Any, Any]]:
        return {
            "item": np.array([event.item for event in events], np.int32),
            "price": np.array([event.time / 2 for event in events], np.float32),
            "row": rows,
        }

    def encode(self, events: Sequence[Event]) -> Encoded:
        rows = self.rows(events)
        vectors = self.made_up.vectors[rows].astype(np.int32)
        return Encoded(
            rows=rows,
            behaviours=self.behaviours(events, rows),
            codes=self.made_up.codes[rows].astype(np.int32),
            vectors=vectors,
            held=np.abs(vectors).max(axis=1, initial=0) < COMPONENT_LIMIT - 1,
        )


EVERY_KIND = [
    MadeUpModel(b"ordinary"),
    MadeUpModel(b"no table", None, groups=0, buckets=0, size=0, recent=0, counters=(), features=()),
    MadeUpModel(b"no limit", None, recent=12),
    MadeUpModel(b"counters", groups=0, buckets=1, size=1, recent=3, counters=("item", "kind")),
    MadeUpModel(b"overflow", None, largest=COMPONENT_LIMIT - 3, buckets=1),
    MadeUpModel(b"too long", 9, largest=COMPONENT_LIMIT + 9),
]
