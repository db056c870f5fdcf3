"""Records of one fingerprint as an Arrow IPC file of two columns, user and record."""

import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa

from hashtab.serving.store.delta import check
from hashtab.serving.store.errors import StoreError
from hashtab.serving.store.keys import User
from hashtab.serving.store.store import PAGE

_FINGERPRINT = b"hashtab.fingerprint"  # key of the file's metadata


def write_records(path: Path, fingerprint: bytes, items: Iterable[tuple[User, bytes]]) -> int:
    """Write records page by page, by temporary name and rename; return how many.

    Raises:
        StoreError: if there are none, or if some users are integers and others strings.
        OSError: if the file cannot be written; nothing is left behind.
    """
    items = iter(items)
    first = next(items, None)
    if first is None:
        raise StoreError(f"there are no records of fingerprint {fingerprint.hex()} to write")
    kind = pa.string() if isinstance(first[0], str) else pa.int64()
    schema = pa.schema(
        [("user", kind), ("record", pa.binary())], metadata={_FINGERPRINT: fingerprint.hex()}
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    written = 0
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in _batches(chain([first], items), schema):
                writer.write_batch(batch)
                written += batch.num_rows
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def read_records(path: Path) -> tuple[bytes, Iterator[dict[User, bytes]]]:
    """The fingerprint of a file and its records, a page at a time.

    All records are verified before any is returned, so that a corrupt file is refused whole.

    Raises:
        StoreError: if it is no such file, or naming the user whose record is corrupt.
        OSError: if the file cannot be read.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        fingerprint = bytes.fromhex((reader.schema.metadata or {})[_FINGERPRINT].decode())
        _verify(path, fingerprint, _pages(reader))
    except (pa.ArrowInvalid, KeyError) as error:
        raise StoreError(f"{path} is not a whole file of exported records; export again") from error
    return fingerprint, _pages(reader)


def _batches(items: Iterator[tuple[User, bytes]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    while page := list(islice(items, PAGE)):
        users, records = zip(*page, strict=True)
        try:
            yield pa.record_batch([pa.array(users, schema.field("user").type), records], schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
            raise StoreError(
                "the users of one fingerprint must be all integers or all strings to be exported"
            ) from error


def _pages(reader: pa.ipc.RecordBatchFileReader) -> Iterator[dict[User, bytes]]:
    for i in range(reader.num_record_batches):
        batch = reader.get_batch(i)
        users, records = batch.column("user").to_pylist(), batch.column("record").to_pylist()
        yield dict(zip(users, records, strict=True))


def _verify(path: Path, fingerprint: bytes, pages: Iterator[dict[User, bytes]]) -> None:
    for user, record in chain.from_iterable(page.items() for page in pages):
        try:
            check(record, fingerprint)
        except StoreError as error:
            raise StoreError(f"{path}, user {user!r}: {error}; export again") from error
