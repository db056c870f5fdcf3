"""An opened index of items: the items nearest to a user, among those that are asked for."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from hashtab.serving.bundle import Bundle
from hashtab.serving.retrieval.errors import RetrievalError
from hashtab.serving.retrieval.manifest import AGAIN, ITEMS, IVF, SPACE, IndexManifest
from hashtab.serving.retrieval.space import Space
from hashtab.serving.store import UserRecord

_SMALL = 2048  # items of which each one is compared; more than that is a search

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Items found for one user, the nearest first. C items.

    Args:
        rows: `[C]` int64, catalogue rows.
        similarity: `[C]` float32, the inner product with the user; how much likelier the user meets
            the item than another item, as a logarithm.
    """

    rows: Int64
    similarity: Float32


class RetrievalIndex:
    """The items of one fingerprint; open it once in each process, for all of its threads.

    Args:
        manifest: checked.
        items: faiss index of the items' places.
        space: of users and items.

    Attributes:
        manifest: see above.
        space: see above.
    """

    def __init__(self, manifest: IndexManifest, items: Any, space: Space) -> None:
        self.manifest = manifest
        self.space = space
        self._items = items

    @classmethod
    def open(cls, folder: str | Path, bundle: Bundle) -> Self:
        """Open the index of a bundle's items.

        Raises:
            RetrievalError: if there is none, it is damaged, or it belongs to another fingerprint.
        """
        folder = Path(folder)
        manifest = IndexManifest.read(folder)
        if manifest.fingerprint != bundle.manifest.fingerprint:
            raise RetrievalError(
                f"{folder} is the index of fingerprint {manifest.fingerprint}, the bundle "
                f"{bundle.folder} has {bundle.manifest.fingerprint}: its vectors mean something "
                "else; build the bundle's own with pipelines/build_index.py"
            )
        # Its threads would wait for each other, and for those of onnxruntime.
        faiss.omp_set_num_threads(1)
        try:
            items = faiss.read_index(str(folder / ITEMS))
        except RuntimeError as error:
            raise RetrievalError(f"{folder / ITEMS} cannot be read by faiss; {AGAIN}") from error
        if manifest.kind == IVF:
            items.make_direct_map()  # to compare items one by one
        return cls(manifest, items, Space.read(folder / SPACE))

    def looking_into(self, nprobe: int) -> "RetrievalIndex":
        """Return the same index whose searches look into another number of cells."""
        return RetrievalIndex(replace(self.manifest, nprobe=nprobe), self._items, self.space)

    @property
    def knows_popularity(self) -> bool:
        """Whether it knows how often items are met, and so what to give someone unknown."""
        return self.manifest.data_digest is not None

    def __len__(self) -> int:
        return self.manifest.items

    def search(
        self,
        record: UserRecord,
        count: int,
        *,
        excluded: Int64 | None = None,
        allowed: Int64 | None = None,
    ) -> Found:
        """Find the items nearest to a user.

        Args:
            record: of the user; an empty one finds the items that are met most.
            count: items wanted; fewer come where there are no more.
            excluded: catalogue rows that are not wanted; none by default.
            allowed: catalogue rows of which all that is found must be; all by default. Up to 2,048
                are compared one by one, which is exact.
        """
        return self.find(self.space.query(record), count, excluded=excluded, allowed=allowed)

    def find(
        self,
        query: Float32,
        count: int,
        *,
        excluded: Int64 | None = None,
        allowed: Int64 | None = None,
    ) -> Found:
        """Find the items nearest to a query `[D + 1]` float32 of the space; see `search`."""
        if allowed is not None:
            rest = allowed if excluded is None else np.setdiff1d(allowed, excluded)
            if len(rest) <= _SMALL:
                return self._among(query, count, rest)
        wanted = np.ones(len(self), bool) if allowed is None else np.zeros(len(self), bool)
        if allowed is not None:
            wanted[allowed] = True
        if excluded is not None:
            wanted[excluded] = False
        return self._search(query, count, wanted)

    def _among(self, query: Float32, count: int, rows: Int64) -> Found:
        """Compare the user with each of a few items."""
        rows = np.unique(rows)
        similarity = self._items.reconstruct_batch(rows) @ query
        best = np.argsort(-similarity, kind="stable")[:count]
        return Found(rows=rows[best], similarity=similarity[best])

    def _search(self, query: Float32, count: int, wanted: NDArray[np.bool_]) -> Found:
        there = int(np.count_nonzero(wanted))
        count = min(count, there)
        if count == 0:
            return Found(rows=np.empty(0, np.int64), similarity=np.empty(0, np.float32))
        # What is wanted is spread over more cells than the same number of any items.
        nprobe = min(self.manifest.nlist, -(-self.manifest.nprobe * len(self) // there))
        found = self._look(query, count, wanted, nprobe)
        if len(found.rows) < count:
            found = self._look(query, count, wanted, self.manifest.nlist)
        return found

    def _look(self, query: Float32, count: int, wanted: NDArray[np.bool_], nprobe: int) -> Found:
        selector = None
        if not wanted.all():
            selector = faiss.IDSelectorBitmap(np.packbits(wanted, bitorder="little"))
        if self.manifest.kind == IVF:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
        else:
            parameters = faiss.SearchParameters(sel=selector)
        similarity, rows = self._items.search(query[None], count, params=parameters)
        found = rows[0] >= 0
        return Found(rows=rows[0][found], similarity=similarity[0][found])


def index_beside(bundle: str | Path) -> Path:
    """Return the folder where the index of a bundle's folder lies, if there is one."""
    folder = Path(bundle)
    return folder.with_name(f"{folder.name}-index")
