"""Retrieval: from what is kept of a user to the items nearest to them, out of the whole catalogue.

An index of a bundle's items is built once, by `pipelines/build_index.py`, and carries the
fingerprint of the bundle: user tables and item vectors of two models never meet.
"""

from hashtab.serving.retrieval.building import Sample, build_index
from hashtab.serving.retrieval.errors import RetrievalError
from hashtab.serving.retrieval.index import Found, RetrievalIndex, index_beside
from hashtab.serving.retrieval.manifest import IndexManifest, Recall
from hashtab.serving.retrieval.space import Space
from hashtab.serving.retrieval.vectors import item_columns, item_vectors, mean_behaviour, seen_rows

__all__ = [
    "Found",
    "IndexManifest",
    "Recall",
    "RetrievalError",
    "RetrievalIndex",
    "Sample",
    "Space",
    "build_index",
    "index_beside",
    "item_columns",
    "item_vectors",
    "mean_behaviour",
    "seen_rows",
]
