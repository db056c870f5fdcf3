"""What can go wrong with stored user tables, each error one sentence that says what to do."""


class StoreError(ValueError):
    """A store or a record that cannot be used: says which, why, and what to do about it."""


class CorruptRecordError(StoreError):
    """Bytes that are not, or no longer, a record; its user must be built anew."""


class ForeignRecordError(StoreError):
    """A whole record of another model, layout or format, which is never read as one's own."""


class TableOverflowError(StoreError):
    """A sum that leaves the range of a table's entries."""
