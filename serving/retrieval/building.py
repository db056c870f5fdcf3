"""Builds the index of a bundle's items: fits the space, makes the cells, measures the recall."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from hashtab.serving.bundle import Bundle
from hashtab.serving.retrieval.index import RetrievalIndex
from hashtab.serving.retrieval.manifest import (
    FLAT,
    FORMAT,
    ITEMS,
    IVF,
    SPACE,
    IndexManifest,
    Recall,
)
from hashtab.serving.retrieval.space import Space
from hashtab.serving.retrieval.vectors import item_vectors

WANTED_RECALL = 0.99
AT = 500  # items of which the recall is measured

_FEW = 8192  # items that exact search compares within a tenth of a millisecond
_SEED = 0
_MADE_UP, _BEHAVIOURS = 512, 100  # users, and behaviours of each, where no data set has any

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Users that an index is fitted to and measured with. U users, two at least.

    Args:
        means: `[U, D]` float64, mean behaviour of each.
        behaviours: `[U]`, behaviours of each.
        seen: catalogue rows that each has met; None where no one knows.
        words: what the users are, for the manifest.
    """

    means: Float64
    behaviours: Float64
    seen: Sequence[Int64] | None
    words: str

    @classmethod
    def made_up(cls, vectors: Float32) -> Self:
        """Draw users whose behaviours are any items."""
        random = np.random.default_rng(_SEED)
        rows = random.integers(len(vectors), size=(_MADE_UP, _BEHAVIOURS))
        return cls(
            means=vectors[rows].mean(axis=1, dtype=np.float64),
            behaviours=np.full(_MADE_UP, float(_BEHAVIOURS)),
            seen=None,
            words=f"{_MADE_UP} made-up users of {_BEHAVIOURS} random items each",
        )


def build_index(
    bundle: Bundle,
    folder: Path,
    *,
    counts: Float64 | None = None,
    sample: Sample | None = None,
    data_digest: str | None = None,
    as_of: int | None = None,
) -> IndexManifest:
    """Write the index of a bundle's items into an empty folder; the same for the same arguments.

    Args:
        bundle: whose catalogue and encoder are meant.
        folder: of the index.
        counts: `[items]`, times each item was met; without, no item is more popular than another.
        sample: of users; made up where there is none.
        data_digest: of the data set that counts and sample come from.
        as_of: microseconds since 1970 UTC, their moment.

    Returns:
        The manifest.

    Raises:
        BundleError: if the model keeps no table.
    """
    begun = time.perf_counter()
    vectors = item_vectors(bundle)
    counts = np.zeros(len(vectors)) if counts is None else counts
    sample = sample or Sample.made_up(vectors)
    space = Space.fit(vectors, counts, sample.means, sample.behaviours)
    places = space.place(vectors, counts)
    nlist = 1 if len(places) <= _FEW else 2 ** round(np.log2(len(places)) / 2)
    items = _exact(places) if nlist == 1 else _in_cells(places, nlist)
    draft = IndexManifest(
        format=FORMAT,
        fingerprint=bundle.manifest.fingerprint,
        bundle_digest=bundle.manifest.digest,
        data_digest=data_digest,
        as_of=as_of,
        items=len(places),
        size=places.shape[1],
        kind=FLAT if nlist == 1 else IVF,
        metric="inner product",
        nlist=nlist,
        nprobe=nlist,
        recall=Recall(value=1.0, at=AT, users=0, sample=sample.words, seen_excluded=False),
        seconds=0.0,
        versions={"faiss-cpu": version("faiss-cpu"), "numpy": version("numpy")},
        files={},
    )
    measured = _tuned(RetrievalIndex(draft, items, space), sample)
    faiss.write_index(items, str(folder / ITEMS))
    space.write(folder / SPACE)
    return replace(measured, seconds=round(time.perf_counter() - begun, 3)).write(folder)


def _exact(places: Float32) -> Any:
    index = faiss.IndexFlatIP(places.shape[1])
    index.add(places)
    return index


def _in_cells(places: Float32, nlist: int) -> Any:
    """Return a faiss index of cells around the centres of k-means.

    An item's cell is that of the nearest centre, and cells are searched in the order of their
    centre's inner product with the query. With the clustering by inner products that faiss takes by
    itself, 16 of 256 cells found 2% of Complete Journey's items in place of 99.7%.
    """
    size = places.shape[1]
    faiss.omp_set_num_threads(1)  # sums of several threads come in any order
    clustering = faiss.Kmeans(size, nlist, niter=15, seed=_SEED)
    clustering.train(places)
    centres, nearest = faiss.IndexFlatIP(size), faiss.IndexFlatL2(size)
    centres.add(clustering.centroids)
    nearest.add(clustering.centroids)
    cells = np.ascontiguousarray(nearest.search(places, 1)[1][:, 0], np.int64)
    index = faiss.IndexIVFFlat(centres, size, nlist, faiss.METRIC_INNER_PRODUCT)
    index.add_core(len(places), faiss.swig_ptr(places), None, faiss.swig_ptr(cells))
    return index


def _tuned(index: RetrievalIndex, sample: Sample) -> IndexManifest:
    """Return the manifest with the fewest cells that reach the recall wanted.

    One half of the users chooses, with room for two standard errors, the other half measures.
    """
    manifest = index.manifest
    queries = index.space.queries(sample.means, sample.behaviours)
    seen = sample.seen or [np.empty(0, np.int64)] * len(queries)
    choosing, measuring = (_Answers(index, queries[h::2], seen[h::2]) for h in range(2))
    low, high = 1, manifest.nlist
    while low < high:
        middle = (low + high) // 2
        shares = choosing.shares(middle)
        if shares.mean() - 2 * shares.std() / np.sqrt(len(shares)) >= WANTED_RECALL:
            high = middle
        else:
            low = middle + 1
    recall = replace(
        manifest.recall,
        value=float(measuring.shares(high).mean()),
        users=len(measuring.queries),
        seen_excluded=sample.seen is not None,
    )
    return replace(manifest, nprobe=high, recall=recall)


class _Answers:
    """Queries and what exact search answers them."""

    def __init__(self, index: RetrievalIndex, queries: Float32, seen: Sequence[Int64]) -> None:
        self.index = index
        self.queries = queries
        self.seen = seen
        self.exact = self._find(index.manifest.nlist)

    def shares(self, nprobe: int) -> Float64:
        """Return the share of each exact answer that a search of so many cells finds."""
        pairs = zip(self.exact, self._find(nprobe), strict=True)
        # A user who has met every item misses none.
        return np.array([np.isin(e, found).mean() if len(e) else 1.0 for e, found in pairs])

    def _find(self, nprobe: int) -> list[Int64]:
        index = self.index.looking_into(nprobe)
        pairs = zip(self.queries, self.seen, strict=True)
        return [index.find(query, AT, excluded=seen).rows for query, seen in pairs]
