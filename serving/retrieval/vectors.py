"""Vectors of items and users in the space of a bundle's behaviours; without torch."""

import numpy as np
from numpy.typing import NDArray

from hashtab.features.encoders import PADDING_ID
from hashtab.features.storage import Array
from hashtab.serving.bundle import Bundle
from hashtab.serving.store import SCALE, UserRecord

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

_PIECE = 4096  # items of one call


def item_columns(bundle: Bundle, rows: Int64) -> dict[str, Array]:
    """Return items as behaviours without side features, feature -> `[N]`.

    Such a behaviour's vector is the one that the scorer gives the candidate, to the bit: both are
    sums of the same embeddings. The id of a side feature is that of padding, which has the zero
    vector in every model; the unknown id may have learned one.

    Args:
        bundle: whose catalogue and features are meant.
        rows: `[N]`, catalogue rows, -1 for an unknown item.
    """
    manifest = bundle.manifest
    names = [f.name for f in manifest.features.behaviour if f.name in manifest.items]
    side = np.full(len(rows), PADDING_ID, np.int32)
    return bundle.catalogue.columns(rows, names) | dict.fromkeys(manifest.side, side)


def item_vectors(bundle: Bundle) -> Float32:
    """Return the vector of each item of the catalogue, `[items, D]` float32.

    Raises:
        BundleError: if the model keeps no table, and so has no encoder.
    """
    rows = np.arange(len(bundle.catalogue))
    pieces = [
        bundle.encode(item_columns(bundle, rows[start : start + _PIECE]))[2]
        for start in range(0, len(rows), _PIECE)
    ]
    return np.concatenate(pieces).astype(np.float32) / np.float32(SCALE)


def mean_behaviour(record: UserRecord) -> NDArray[np.float64]:
    """Return the mean vector of the behaviours in a user's table, `[D]`; zeros where it is empty.

    Each group's buckets add up to the sum of all behaviours, whatever they were hashed to.
    """
    total: NDArray[np.float64] = record.table[0].sum(axis=0, dtype=np.int64) / SCALE
    return total / max(record.behaviours, 1)


def seen_rows(bundle: Bundle, record: UserRecord) -> Int64 | None:
    """Return the catalogue rows of all items a user ever met; None where the model counts no items.

    The counter of items counts row + 1, see `Catalogue.counted`.
    """
    if bundle.manifest.item not in bundle.layout.counters:
        return None
    keys, _ = record.counters[bundle.manifest.item]
    return keys.astype(np.int64) - 1
