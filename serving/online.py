"""The scorer in two halves: what is of an item alone, computed once for all, and the rest."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hashtab.features.storage import Array
from hashtab.serving.manifest import ITEMS, ONLINE
from hashtab.serving.session import open_session

_PIECE = 4096  # items of one call

FEWEST = 2
"""Rows of one call, at least: a product of one row is summed in another order."""


class OnlineScorer:
    """Both halves' graphs; together they give the whole scorer's scores, to the bit.

    Args:
        folder: of the bundle.
        threads: that one call may use.

    Raises:
        BundleError: if onnxruntime cannot load one of them.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._items = open_session(folder / ITEMS, threads)
        self._rest = open_session(folder / ONLINE, threads)
        self._parts = [output.name for output in self._items.get_outputs()]

    def items(self, columns: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the first half.

        Args:
            columns: `candidate.<name>` -> `[N]`, of N items.

        Returns:
            Inputs of the second half by name, `[N, ...]`.
        """
        count = len(next(iter(columns.values())))
        number = max(1, math.ceil(count / _PIECE))
        pieces = {  # of equal length, so that none is of one row
            name: np.array_split(np.resize(column, max(count, FEWEST)), number)
            for name, column in columns.items()
        }
        found = [
            self._items.run(None, {name: piece[i][None] for name, piece in pieces.items()})
            for i in range(number)
        ]
        return {
            name: np.concatenate([parts[k][0] for parts in found])[:count]
            for k, name in enumerate(self._parts)
        }

    def scores(self, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
        """Compute the second half from its inputs by name, to `[U, C]`."""
        scores: NDArray[np.float32] = self._rest.run(None, inputs)[0]
        return scores

    def whole(self, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
        """Compute one half after the other from the whole scorer's inputs by name, to `[U, C]`."""
        features = {k: v for k, v in inputs.items() if k.startswith("candidate.")}
        others = {k: v for k, v in inputs.items() if k not in features}
        parts = self._items.run(None, features)
        return self.scores(others | dict(zip(self._parts, parts, strict=True)))
