"""One loaded generation of the model: all that a request needs of it, opened together."""

import logging
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from hashtab.features.storage import Array
from hashtab.serving.bundle import Bundle, Float32
from hashtab.serving.items import Item, ItemIndex
from hashtab.serving.retrieval import RetrievalError, RetrievalIndex
from hashtab.serving.scorer.context import ContextEncoder
from hashtab.serving.scorer.counters import CounterReader
from hashtab.serving.store import UserRecord

_LOG = logging.getLogger(__name__)

SCORES_AT_ONCE = 4096
"""Candidates of one call, as in batch scoring: a runtime may round otherwise in another size."""


class ModelName(msgspec.Struct, frozen=True):
    """Which model answered.

    Args:
        version: number in the registry, or the digest's first digits.
        digest: of the bundle.
        fingerprint: of the users' tables that belong to it, 16 hex digits.
    """

    version: str
    digest: str
    fingerprint: str


class Served:
    """One generation; a request holds on to one from its beginning to its end.

    Used by one thread at a time.

    Args:
        bundle: opened.
        version: number in the registry; None where there is none.
        retrieval: index of the items, if there is one.
    """

    def __init__(
        self, bundle: Bundle, version: str | None, retrieval: RetrievalIndex | None
    ) -> None:
        manifest, layout = bundle.manifest, bundle.layout
        self.bundle = bundle
        self.retrieval = retrieval
        self.manifest = manifest
        self.layout = layout
        self.model = ModelName(
            version or manifest.digest[:12], manifest.digest, manifest.fingerprint
        )
        self.catalogue = bundle.catalogue
        self.items = ItemIndex(bundle.catalogue)
        self.context = ContextEncoder(bundle)
        self.empty = UserRecord.empty(layout)
        self.reads_history = bool(layout.groups or layout.recent or layout.counters)
        self._counters = CounterReader(bundle)
        # Of all items at once; the unknown one is the last row of both, which is what -1 means.
        self._item_parts = bundle.item_parts(bundle.catalogue.features)

    @classmethod
    def open(cls, folder: Path, version: str | None = None, index: Path | None = None) -> "Served":
        """Open a bundle, replay its golden batch and score once, so that no request waits.

        Args:
            folder: of the bundle.
            version: number in the registry; None where there is none.
            index: folder of its items' index, which need not be there.

        Raises:
            BundleError: if the bundle cannot be used.
        """
        bundle = Bundle.open(folder)
        served = cls(bundle, version, _open_index(index, bundle))
        rows = np.full(2, -1)
        served.score(served.empty, rows, served.context.encode({}, None, len(rows)).columns)
        return served

    def item(self, row: int, asked: Item) -> Item:
        """Return an item as the catalogue names it, or as it was asked for where it is unknown."""
        return asked if row < 0 else self.catalogue.items[row]

    def score(
        self, record: UserRecord, rows: NDArray[np.int64], context: dict[str, Array]
    ) -> Float32:
        """Return the probability of each candidate, `[C]`: the bits of a batch score.

        Args:
            record: of the user.
            rows: `[C]`, catalogue row of each candidate, -1 where it is unknown.
            context: context feature -> `[C]`, encoded.
        """
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), SCORES_AT_ONCE):
            some = slice(start, start + SCORES_AT_ONCE)
            wanted = rows[some]
            scores[some] = self.bundle.score_items(
                record,
                {name: part.take(wanted, axis=0) for name, part in self._item_parts.items()},
                {name: column[some] for name, column in context.items()},
                self._counters.read(record, wanted),
            )
        return scores


def _open_index(folder: Path | None, bundle: Bundle) -> RetrievalIndex | None:
    if folder is None or not folder.exists():
        return None
    try:
        return RetrievalIndex.open(folder, bundle)
    except RetrievalError as error:  # scores do not need it
        _LOG.warning("%s; nothing is recommended from it", error)
        return None
