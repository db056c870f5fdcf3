"""One writer at a time: who replaces or deletes many records of an LMDB store holds it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hashtab.serving.store.errors import StoreError

LOCK = "writing.lock"  # beside LMDB's own files


@contextmanager
def only_writer(url: str) -> Iterator[None]:
    """Hold an LMDB store that is there against other encodings, imports and drops.

    A Redis server is not held.

    Raises:
        StoreError: if another process holds it, or its folder cannot be written.
    """
    # Imported when asked for: readers of a store need not wait for polars.
    from hashtab.features.storage import exclusive

    if "://" in url:
        yield
        return
    folder = Path(url.removeprefix("lmdb:"))
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder / LOCK))
        except BlockingIOError as error:
            raise StoreError(
                f"another process writes users into {folder}; wait for it or stop it"
            ) from error
        except OSError as error:
            raise StoreError(
                f"store {folder} cannot be written ({error.strerror}): name another one, or "
                "change the permissions of its folder"
            ) from error
        yield
