"""User tables: the arithmetic, the record of a user, and the stores that keep records.

`python -m hashtab.serving.store` counts, verifies, exports, imports and drops what a store holds.
"""

from hashtab.serving.store.delta import (
    DELTA_LIMIT,
    Delta,
    changed,
    check,
    extended,
    first_delta,
    row_type,
    split,
    unpack,
)
from hashtab.serving.store.errors import (
    CorruptRecordError,
    ForeignRecordError,
    StoreError,
    TableOverflowError,
)
from hashtab.serving.store.events import Event, SideValue
from hashtab.serving.store.fixed_point import COMPONENT_LIMIT, SCALE, add, sum_by_bucket
from hashtab.serving.store.keys import User
from hashtab.serving.store.log import Change, Head, LogReader
from hashtab.serving.store.plan import HEARTBEAT, PLAN, KeptModel, Plan
from hashtab.serving.store.record import RecordLayout, UserRecord, pack
from hashtab.serving.store.store import TableStore, open_store
from hashtab.serving.store.writing import only_writer

__all__ = [
    "COMPONENT_LIMIT",
    "DELTA_LIMIT",
    "HEARTBEAT",
    "PLAN",
    "SCALE",
    "Change",
    "CorruptRecordError",
    "Delta",
    "Event",
    "ForeignRecordError",
    "Head",
    "KeptModel",
    "LogReader",
    "Plan",
    "RecordLayout",
    "SideValue",
    "StoreError",
    "TableOverflowError",
    "TableStore",
    "User",
    "UserRecord",
    "add",
    "changed",
    "check",
    "extended",
    "first_delta",
    "only_writer",
    "open_store",
    "pack",
    "row_type",
    "split",
    "sum_by_bucket",
    "unpack",
]
