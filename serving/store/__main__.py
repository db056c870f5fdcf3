"""Counts, verifies, exports, imports and drops what a store of user tables holds.

`python -m hashtab.serving.store count STORE`, and so on; STORE is a folder or a redis:// URL.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from hashtab.serving.store.arrow_file import read_records, write_records
from hashtab.serving.store.delta import check
from hashtab.serving.store.errors import StoreError
from hashtab.serving.store.keys import User, check_fingerprint
from hashtab.serving.store.log import Change
from hashtab.serving.store.store import TableStore, open_store
from hashtab.serving.store.writing import only_writer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0, 1 if `verify` found corrupt records, 2 if the command could not be done.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hashtab.serving.store", description="Look after a store of user tables."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, summary in (
        ("count", _count, "users by fingerprint"),
        ("verify", _verify, "read every record; exit code 1 if any is corrupt"),
        ("export", _export, "write the records of a fingerprint to an Arrow IPC file"),
        ("import", _import, "put the records of such a file into a store"),
        ("drop", _drop, "delete all of a fingerprint"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        command.add_argument("store", metavar="STORE", help="a folder or a redis:// URL")
        if name in ("export", "import"):
            command.add_argument("file", metavar="FILE", type=Path)
        if name in ("verify", "export", "drop"):
            required = name != "verify"
            command.add_argument("--fingerprint", metavar="HEX", required=required)
        if name == "verify":
            command.add_argument(
                "--remove", action="store_true", help="delete corrupt records, to be built again"
            )
    return parser


def _count(options: argparse.Namespace) -> int:
    with open_store(options.store, readonly=True) as store:
        counts = store.counts()
        for fingerprint, users in sorted(counts.items()):
            print(f"{fingerprint.hex()}  {users:>12,} users")
        total, models = sum(counts.values()), len(counts)
        print(f"counted {total:,} records of {models} fingerprints in {store.name}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    held = only_writer(options.store) if options.remove else nullcontext()
    with _existing(options.store, readonly=not options.remove) as store, held:
        asked = options.fingerprint
        fingerprints = sorted(store.counts()) if asked is None else [_fingerprint(asked)]
        read = corrupt = 0
        for fingerprint in fingerprints:
            records, found = _corrupt_users(store, fingerprint)
            read, corrupt = read + records, corrupt + len(found)
            if options.remove and found:
                store.remove(fingerprint, [])  # its notes
                store.change(found, partial(_remove, fingerprint, found))
        removed = ", removed: encode users again" if options.remove and corrupt else ""
        print(f"verified {read:,} records in {store.name}: {corrupt:,} corrupt{removed}")
    return 1 if corrupt else 0


def _remove(fingerprint: bytes, users: list[User], change: Change) -> None:
    for user, head in zip(users, change.heads(users), strict=True):
        if head is not None:  # so that a service that is just about to write the user looks again
            change.put_head(user, head)
    change.put_records(fingerprint, dict.fromkeys(users))


def _corrupt_users(store: TableStore, fingerprint: bytes) -> tuple[int, list[User]]:
    """How many records were read, and the users of those that are corrupt."""
    read, corrupt = 0, list[User]()
    for user, record in store.items(fingerprint):
        read += 1
        try:
            check(record, fingerprint)
        except StoreError as error:
            print(f"{fingerprint.hex()} user {user!r}: {error}")
            corrupt.append(user)
    return read, corrupt


def _export(options: argparse.Namespace) -> int:
    fingerprint = _fingerprint(options.fingerprint)
    with open_store(options.store, readonly=True) as store:
        written = write_records(options.file, fingerprint, store.items(fingerprint))
        print(f"exported {written:,} records from {store.name} to {options.file}")
    return 0


def _import(options: argparse.Namespace) -> int:
    fingerprint, pages = read_records(options.file)
    imported = 0
    with open_store(options.store) as store, only_writer(options.store):
        store.check_not_kept(fingerprint)
        store.remove(fingerprint, [])  # its notes may call records complete that are now replaced
        for page in pages:
            store.put(fingerprint, page)
            imported += len(page)
        print(f"imported {imported:,} records from {options.file} into {store.name}")
    return 0


def _drop(options: argparse.Namespace) -> int:
    with _existing(options.store) as store, only_writer(options.store):
        fingerprint = _fingerprint(options.fingerprint)
        store.check_not_kept(fingerprint)
        dropped = store.drop(fingerprint)
        print(f"dropped {dropped:,} records of {options.fingerprint} from {store.name}")
    return 0


def _existing(url: str, *, readonly: bool = False) -> TableStore:
    """Open a store that is there, for a command that would make no sense on a new one."""
    open_store(url, readonly=True).close()
    return open_store(url, readonly=readonly)


def _fingerprint(text: str) -> bytes:
    try:
        return check_fingerprint(bytes.fromhex(text))
    except ValueError as error:
        raise StoreError(
            f"--fingerprint must be 16 hexadecimal digits, as `count` prints them, got {text!r}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
