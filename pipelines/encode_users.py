#!/usr/bin/env python3
"""Encode every user of a prepared data set into a store of user tables, as of any time.

`python pipelines/encode_users.py --bundle runs/<name>/bundle --data data/my_shop --store tables`
writes a record for each user. Run again, it does what is left: nothing, where all is done.
"""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError, disk_errors
from hashtab.features.sources import TIME
from hashtab.features.storage import exclusive, map_arrow
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.encoding import Encoding, ShardReport, open_bundle, verify_user
from hashtab.pipelines.leave import STOPPED
from hashtab.pipelines.places import python_script
from hashtab.pipelines.registry import find_bundle
from hashtab.pipelines.shard_tasks import run_shards
from hashtab.serving.errors import BundleError
from hashtab.serving.store import StoreError, open_store

_SAMPLE = 32


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Settings of encoding.

    Args:
        bundle: folder of a bundle, or models:/<name>@champion in the registry.
        data: folder of a prepared data set, the model's own or a later one.
        store: of the tables: a folder for LMDB, or redis://host:port/db. All workers must reach
            it; LMDB serves one machine.
        as_of: what had happened strictly before it is encoded; a time such as 2024-03-01T12:00 in
            UTC, or the name of a split for the moment of its first request. By default all.
        workers: Ray tasks at a time, one core each; 0 encodes in this process.
        address: of a Ray cluster, for example auto.
        tracking_uri: of MLflow, for a bundle in the registry.
    """

    bundle: str | None = None
    data: str = "data/complete_journey"
    store: str = "tables"
    as_of: str | None = None
    workers: int = 2
    address: str | None = None
    tracking_uri: str = "sqlite:///mlflow.db"

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise SettingsError(f"workers must not be negative, got {self.workers}")


def moment(dataset: Dataset, as_of: str | None) -> int:
    """Return a moment in microseconds since 1970 UTC.

    Raises:
        SettingsError: if `as_of` is neither a time nor a split.
    """
    shards = range(dataset.manifest.shards)
    if as_of is None:
        files = [dataset.folder / "histories" / f"{shard:05d}.arrow" for shard in shards]
        return 1 + max(int(map_arrow(file)[TIME].max(initial=-1)) for file in files)
    if as_of in dataset.manifest.splits:
        files = [dataset.folder / "samples" / as_of / f"{shard:05d}.arrow" for shard in shards]
        latest = np.iinfo(np.int64).max
        return min(int(map_arrow(file)[TIME].min(initial=latest)) for file in files)
    try:
        when = datetime.fromisoformat(as_of)
    except ValueError as error:
        raise SettingsError(
            f"as_of must be a time such as 2024-03-01T12:00 or one of "
            f"{', '.join(dataset.manifest.splits)}, got {as_of!r}"
        ) from error
    since = (when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return since // timedelta(microseconds=1)


@contextmanager
def only_writer(store: str) -> Iterator[None]:
    """Hold an LMDB store against other encodings for as long as this one lasts.

    Raises:
        SettingsError: if another process encodes into it, or its folder cannot be written.
    """
    if "://" in store:
        yield
        return
    folder = Path(store.removeprefix("lmdb:"))
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Beside the folder, which is to hold the store's files and no others.
            stack.enter_context(exclusive(folder.with_name(f".{folder.name}.encoding")))
        except BlockingIOError as error:
            raise SettingsError(
                f"another process encodes users into {folder}; wait for it or stop it"
            ) from error
        except OSError as error:
            raise SettingsError(
                f"store {folder} cannot be written ({error.strerror}): give another --store, or "
                "change the permissions of its folder"
            ) from error
        yield


def encode(settings: EncodeSettings) -> tuple[Encoding, list[ShardReport]]:
    """Encode what is left, check a sample, and return the job with a report for each shard.

    Raises:
        SettingsError: if a setting cannot be used.
        BundleError: if the bundle cannot be used.
        DataError: if the data cannot.
        StoreError: if the store cannot, or does not hold what was written.
    """
    if settings.bundle is None:
        raise SettingsError("--bundle must name the folder of a bundle or a registered model")
    bundle = find_bundle(settings.bundle, settings.tracking_uri).resolve()
    dataset = Dataset.open(settings.data)
    encoding = Encoding(
        bundle=str(bundle),
        data=str(dataset.folder.resolve()),
        data_digest=dataset.manifest.digest,
        store=absolute_store(settings.store),
        as_of=moment(dataset, settings.as_of),
    )
    encoding.histories(0)  # meets a bundle and data that do not fit before any work
    shards = range(dataset.manifest.shards)
    with only_writer(encoding.store), open_store(encoding.store) as store:
        encoding.begin(store)
        left = [shard for shard in shards if encoding.done(store, shard) is None]
        if left:
            with cluster(settings.workers, settings.address):
                run_shards(encoding, left, settings.workers)
        reports = [encoding.done(store, shard) for shard in shards]
        done = [found for found in reports if found is not None]
        if len(done) < len(reports):
            raise StoreError(
                f"another process encoded other users into {store.name} meanwhile: see that it "
                "has ended, and run again"
            )
        verify_sample(encoding, done)
        return encoding, done


def absolute_store(store: str) -> str:
    """Name an LMDB folder by its absolute path: workers have working directories of their own."""
    return store if "://" in store else str(Path(store.removeprefix("lmdb:")).resolve())


def verify_sample(encoding: Encoding, reports: list[ShardReport]) -> None:
    """Hold records of some users, spread over the shards, against their definition.

    Args:
        encoding: that is done.
        reports: of all shards.

    Raises:
        StoreError: if one differs.
    """
    chosen = np.random.default_rng(encoding.as_of % 2**32).integers(len(reports), size=_SAMPLE)
    with open_store(encoding.store, readonly=True) as store:
        for shard, count in zip(*np.unique(chosen, return_counts=True), strict=True):
            histories = encoding.histories(int(shard))
            users = np.linspace(0, len(histories) - 1, min(count, len(histories)))
            for user in users.astype(int).tolist():
                if str(histories.users[user]) not in reports[shard].refused:
                    verify_user(encoding, store, histories, user)


def report(
    settings: EncodeSettings, encoding: Encoding, shards: list[ShardReport], seconds: float
) -> str:
    """Say what was made, where it lies and what to run next."""
    users = sum(part.users for part in shards)
    behaviours = sum(part.behaviours for part in shards)
    refused = {user: why for part in shards for user, why in part.refused.items()}
    when = datetime.fromtimestamp(encoding.as_of / 1e6, UTC).isoformat(timespec="seconds")
    bundle = open_bundle(encoding.bundle)
    store = re.sub("(?<=://).*@", "", settings.store)  # a URL without its password
    lines = [
        f"{store}: {users:,} users, {behaviours:,} behaviours before {when}, "
        f"fingerprint {bundle.manifest.fingerprint}, in {seconds:.1f} s",
        f"a sample of {_SAMPLE} records equals its definition bit for bit",
        *(f"no record of user {user}: {why}" for user, why in refused.items()),
        f"next: {python_script('score_batch.py')} --bundle {settings.bundle} "
        f"--store {store} --requests requests.parquet --output scores",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse, encode, report; what cannot be encoded ends with one line and exit code 2."""
    start = time.perf_counter()
    try:
        settings = parse(EncodeSettings, arguments, __doc__)
        with disk_errors(Path(settings.store)):
            encoding, shards = encode(settings)
    except (SettingsError, DataError, BundleError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    print(report(settings, encoding, shards, time.perf_counter() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
