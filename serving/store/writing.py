"""One writer at a time: who replaces or deletes many records of an LMDB store holds it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hashtab.features.storage import exclusive
from hashtab.serving.store.errors import StoreError


@contextmanager
def only_writer(url: str) -> Iterator[None]:
    """Hold an LMDB store against other encodings, imports and drops; a Redis server is not held.

    Raises:
        StoreError: if another process holds it, or the folder around it cannot be written.
    """
    if "://" in url:
        yield
        return
    folder = Path(url.removeprefix("lmdb:"))
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Beside the folder, which is to hold the store's files and no others.
            stack.enter_context(exclusive(folder.with_name(f".{folder.name}.writing")))
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
