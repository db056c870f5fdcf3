"""The one error of this folder that a user's data, schema or disk can cause."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl


class DataError(ValueError):
    """Data or a schema that cannot be used: says where, what, and what to do about it."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, met by Python or by polars, into a `DataError` that names `folder`."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "os error 28" in str(error):
            raise DataError(
                f"the disk that holds {folder} is full: free some space and run again; "
                "the work done so far is kept and will be resumed"
            ) from error
        raise
