#!/usr/bin/env python3
"""Encode every user of a prepared data set into a store of user tables, as of any time.

`python pipelines/encode_users.py --bundle runs/<name>/bundle --data data/my_shop --store tables`
writes a record for each user. Run again, it does what is left: nothing, where all is done. Records
of users whom the data does not know stay as they were; drop the fingerprint first to lose them.
"""

import re
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError, disk_errors
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.encoding import (
    Encoding,
    ShardReport,
    absolute_store,
    moment,
    verify_sample,
)
from hashtab.pipelines.leave import STOPPED
from hashtab.pipelines.places import DEFAULT_TRACKING, python_script, tracking_option
from hashtab.pipelines.registry import find_bundle
from hashtab.pipelines.shard_tasks import run_shards
from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import BundleError
from hashtab.serving.store import StoreError, only_writer, open_store


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
    tracking_uri: str = DEFAULT_TRACKING

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise SettingsError(f"workers must not be negative, got {self.workers}")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a store holds after encoding.

    Args:
        encoding: the job.
        shards: a report for each.
        checked: records that were held against their definition.
    """

    encoding: Encoding
    shards: list[ShardReport]
    checked: int


def encode(settings: EncodeSettings) -> Encoded:
    """Encode what is left and check a sample.

    Raises:
        SettingsError: if a setting cannot be used.
        BundleError: if the bundle cannot be used.
        DataError: if the data cannot.
        StoreError: if the store cannot, or does not hold what was written.
    """
    if settings.bundle is None:
        raise SettingsError("--bundle must name the folder of a bundle or a registered model")
    bundle = Bundle.open(find_bundle(settings.bundle, settings.tracking_uri).resolve())
    dataset = Dataset.open(settings.data)
    encoding = Encoding(
        bundle=str(bundle.folder),
        bundle_digest=bundle.manifest.digest,
        data=str(dataset.folder.resolve()),
        data_digest=dataset.manifest.digest,
        store=absolute_store(settings.store),
        as_of=moment(dataset, settings.as_of),
    )
    encoding.histories(0)  # meets a bundle and data that do not fit before any work
    shards = range(dataset.manifest.shards)
    with open_store(encoding.store) as store, only_writer(encoding.store):
        store.check_not_kept(bundle.layout.fingerprint)
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
        encoding.end(store)
        checked = verify_sample(encoding, done)
        return Encoded(encoding=encoding, shards=done, checked=checked)


def report(settings: EncodeSettings, encoded: Encoded, seconds: float) -> str:
    """Say what was made, where it lies and what to run next."""
    encoding, shards = encoded.encoding, encoded.shards
    users = sum(part.users for part in shards)
    behaviours = sum(part.behaviours for part in shards)
    refused = {user: why for part in shards for user, why in part.refused.items()}
    when = datetime.fromtimestamp(encoding.as_of / 1e6, UTC).isoformat(timespec="seconds")
    store = re.sub("(?<=://).*@", "", settings.store)  # a URL without its password
    lines = [
        f"{store}: {users:,} users, {behaviours:,} behaviours before {when}, "
        f"fingerprint {encoding.opened.manifest.fingerprint}, in {seconds:.1f} s",
        f"a sample of {encoded.checked:,} records equals its definition bit for bit",
        *(f"no record of user {user}: {why}" for user, why in refused.items()),
        f"next: {python_script('score_batch.py')} --bundle {settings.bundle} "
        f"--store {store} --requests requests.parquet --output scores"
        f"{tracking_option(settings.tracking_uri)}",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse, encode, report; what cannot be encoded ends with one line and exit code 2."""
    start = time.perf_counter()
    try:
        settings = parse(EncodeSettings, arguments, __doc__)
        with disk_errors(Path(settings.store)):
            encoded = encode(settings)
    except (SettingsError, DataError, BundleError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    print(report(settings, encoded, time.perf_counter() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
