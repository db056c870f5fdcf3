"""Arrow files that appear whole or not at all, and come back as views of the mapped file."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

Array = NDArray[Any]

TEMPORARY = ".*.tmp"  # pattern of files that have not got their name yet


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file for this process; the lock ends with it, however it ends.

    Raises:
        BlockingIOError: if another process holds it.
    """
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file by temporary name and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.write_text(text)
    temporary.replace(path)


def write_arrow(path: Path, frame: pl.DataFrame) -> None:
    """Write an uncompressed Arrow IPC file of one record batch by temporary name and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    # One record batch, so that each column is one contiguous range of the file.
    frame.rechunk().write_ipc(
        temporary, compression="uncompressed", record_batch_size=max(frame.height, 1)
    )
    temporary.replace(path)


def map_arrow(path: Path) -> dict[str, Array]:
    """Return the numeric columns of a file as read-only views of its memory map.

    Raises:
        pyarrow.ArrowInvalid: if a column cannot be viewed without a copy.
    """
    with pa.memory_map(str(path)) as mapped:
        table = pa.ipc.open_file(mapped).read_all()
    return {
        name: _view(table.column(name))
        for name in table.column_names
        if pa.types.is_integer(table.schema.field(name).type)
        or pa.types.is_floating(table.schema.field(name).type)
    }


def _view(column: pa.ChunkedArray) -> Array:
    if column.num_chunks == 0:
        return np.empty(0, column.type.to_pandas_dtype())
    (chunk,) = column.chunks
    view: Array = chunk.to_numpy(zero_copy_only=True)
    return view


def frame_of(columns: Mapping[str, Array]) -> pl.DataFrame:
    """A frame of numpy columns."""
    return pl.DataFrame({name: pl.Series(name, values) for name, values in columns.items()})


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
