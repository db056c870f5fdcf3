"""Whole records around a number, light to import for the processes that tests start."""

from dataclasses import replace

import numpy as np

from hashtab.serving.store import RecordLayout, UserRecord, pack

FINGERPRINT = b"*?[a]\\\x00\n"  # all that a pattern or a C string would trip over
LAYOUT = RecordLayout(
    fingerprint=FINGERPRINT,
    groups=4,
    buckets=8,
    size=16,
    recent=5,
    features=(("item", "int32"), ("price", "float32")),
    counters=("item",),
)


def numbered(revision: int, size: int = LAYOUT.size) -> bytes:
    """A whole record whose revision and every table entry are one number."""
    layout = replace(LAYOUT, size=size)
    empty = UserRecord.empty(layout)
    table = np.full(layout.shape, revision, np.int32)
    return pack(replace(empty, revision=revision, table=table), layout)
