"""The arithmetic of tables: integer sums, so that any order and any batching give the same bits.

A table entry is an int32 in units of 2^-16. Integer sums commute, which float sums do not: a table
built at once, one updated event by event and one restarted half way are identical.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashtab.serving.store.errors import TableOverflowError

SCALE = 1 << 16
"""Fixed-point units in 1.0."""

COMPONENT_LIMIT = 1 << 24
"""Every component of a behaviour's vector lies below this in fixed point: |x| < 256.

The exported encoder keeps this bound. Integers below it are exact in float32, so a vector passes
through an ONNX graph without rounding.
"""

_ENTRY = np.iinfo(np.int32)


def sum_by_bucket(
    codes: NDArray[np.integer[Any]], vectors: NDArray[np.int32], buckets: int
) -> NDArray[np.int64]:
    """Sum the vectors of each group's buckets: the definition of a table.

    Args:
        codes: `[N, G]` integers, the bucket of each behaviour in each group.
        vectors: `[N, D]` int32, fixed point.
        buckets: B, buckets of a group.

    Returns:
        `[G, B, D]` int64, fixed point; exact for any N below 2^39.

    Raises:
        ValueError: if shapes do not fit or a code is not in `[0, buckets)`.
    """
    if codes.ndim != 2 or vectors.ndim != 2 or len(codes) != len(vectors):
        raise ValueError(
            f"codes must be [N, G] and vectors [N, D], got {codes.shape} and {vectors.shape}"
        )
    if codes.size and not 0 <= codes.min() <= codes.max() < buckets:
        raise ValueError(
            f"codes must lie in [0, {buckets}), got {codes.min()} to {codes.max()}; "
            "were they hashed with another tau?"
        )
    groups = codes.shape[1]
    sums = np.zeros((groups, buckets, vectors.shape[1]), np.int64)
    for group in range(groups):
        np.add.at(sums[group], codes[:, group], vectors)
    return sums


def add(table: NDArray[np.int32], increments: NDArray[np.int64]) -> NDArray[np.int32]:
    """Add increments to a table; negative ones take behaviours out again.

    An entry overflows at 32768 in units of the embedding, so n behaviours whose components stay
    below x in magnitude are safe while `n * x < 32768`.

    Args:
        table: `[G, B, D]` int32, fixed point.
        increments: `[G, B, D]` int64, fixed point.

    Returns:
        `[G, B, D]` int32, a new table.

    Raises:
        ValueError: if the shapes differ.
        TableOverflowError: if a sum leaves int32; the table given is unchanged.
    """
    if table.shape != increments.shape:
        raise ValueError(f"table is {table.shape} but increments are {increments.shape}")
    room = np.int64(_ENTRY.max) - table, np.int64(_ENTRY.min) - table
    # The room, and not the sum, is compared: it cannot overflow int64, whatever the increments.
    outside = (increments > room[0]) | (increments < room[1])
    if outside.any():
        group, bucket, component = (int(i) for i in np.argwhere(outside)[0])
        total = int(table[group, bucket, component]) + int(increments[group, bucket, component])
        raise TableOverflowError(
            f"table entry (group {group}, bucket {bucket}, component {component}) would become "
            f"{total / SCALE:g}, outside [-32768, 32768): limit the behaviours of a history or "
            "train embeddings of smaller magnitude"
        )
    return (table + increments).astype(np.int32)
