#!/usr/bin/env python3
"""Build the index that finds, out of all items of a bundle, those that suit a user.

`python pipelines/build_index.py --bundle runs/<name>/bundle --data data/my_shop` writes it beside
the bundle, where the scorer looks for it. Run again, it leaves an index that is the same as it is.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError, disk_errors
from hashtab.features.histories import Histories
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.encoding import moment, open_histories, record_of_user
from hashtab.pipelines.places import DEFAULT_TRACKING, shown
from hashtab.pipelines.registry import find_bundle
from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import BundleError
from hashtab.serving.retrieval import (
    IndexManifest,
    Sample,
    build_index,
    index_beside,
    mean_behaviour,
)
from hashtab.serving.store import TableOverflowError

_USERS = 1024  # of the sample


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """Settings of an index.

    Args:
        bundle: folder of a bundle, or models:/<name>@champion in the registry.
        data: folder of a prepared data set, which says how often items are met and who the users
            are; none by default, when no item is more popular than another and users are made up.
        as_of: what had happened strictly before it is counted; a time such as 2024-03-01T12:00 in
            UTC, or the name of a split for the moment of its first request. By default all.
        output: folder of the index; the bundle's with -index at its end by default.
        tracking_uri: of MLflow, for a bundle in the registry.
    """

    bundle: str | None = None
    data: str | None = None
    as_of: str | None = None
    output: str | None = None
    tracking_uri: str = DEFAULT_TRACKING

    def __post_init__(self) -> None:
        if self.as_of is not None and self.data is None:
            raise SettingsError("--as_of is a moment of a data set: name it with --data")


@dataclass(frozen=True, kw_only=True)
class Met:
    """What a data set says of the items and users of a bundle.

    Args:
        data_digest: of the data set.
        as_of: microseconds since 1970 UTC.
        counts: `[items]`, times each item was met before that.
        sample: of users as of then.
    """

    data_digest: str
    as_of: int
    counts: NDArray[np.float64]
    sample: Sample


def build(settings: IndexSettings) -> tuple[Path, IndexManifest]:
    """Build the index of a bundle, unless it is there already.

    Raises:
        SettingsError: if a setting cannot be used, or the output holds something else.
        BundleError: if the bundle cannot be used, or keeps no table.
        DataError: if the data cannot be used.
    """
    if settings.bundle is None:
        raise SettingsError("--bundle must name the folder of a bundle or a registered model")
    bundle = Bundle.open(find_bundle(settings.bundle, settings.tracking_uri).resolve())
    target = Path(settings.output or index_beside(bundle.folder)).resolve()
    dataset = None if settings.data is None else Dataset.open(settings.data)
    as_of = None if dataset is None else moment(dataset, settings.as_of)
    if target.exists():
        data_digest = None if dataset is None else dataset.manifest.digest
        return target, _existing(target, bundle, data_digest, as_of)
    met = None if dataset is None or as_of is None else read(bundle, dataset, as_of)
    building = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        manifest = build_index(bundle, building, **({} if met is None else met.__dict__))
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target, manifest


def _existing(
    target: Path, bundle: Bundle, data_digest: str | None, as_of: int | None
) -> IndexManifest:
    """Return the manifest of the index that is there, if it is whole and the one wanted."""
    manifest = IndexManifest.read(target)
    found = manifest.bundle_digest, manifest.data_digest, manifest.as_of
    if found != (bundle.manifest.digest, data_digest, as_of):
        raise SettingsError(
            f"{target} holds the index of another bundle, data set or moment; remove it, or "
            "choose another --output"
        )
    return manifest


def read(bundle: Bundle, dataset: Dataset, as_of: int) -> Met:
    """Count the items of a data set's histories, and draw a sample of its users.

    Raises:
        DataError: if the data set does not fit the bundle, or no user had done anything by then.
    """
    reader = open_histories(bundle, str(dataset.folder.resolve()), dataset.manifest.digest)
    counts = np.zeros(len(bundle.catalogue))
    users: list[tuple[Histories, int]] = []
    for shard in range(dataset.manifest.shards):
        histories = reader.shard(shard).before(as_of)
        for user in np.flatnonzero(histories.ends > histories.starts).tolist():
            rows = histories.rows[histories.of(user)]
            counts += np.bincount(rows[rows >= 0], minlength=len(counts))
            users.append((histories, user))
    return Met(
        data_digest=dataset.manifest.digest,
        as_of=as_of,
        counts=counts,
        sample=_sample(bundle, users, as_of),
    )


def _sample(bundle: Bundle, users: list[tuple[Histories, int]], as_of: int) -> Sample:
    means, behaviours, seen = [], [], []
    for i in np.random.default_rng(0).permutation(len(users))[:_USERS].tolist():
        histories, user = users[i]
        try:
            record = record_of_user(bundle, histories, user, as_of)
        except TableOverflowError:
            continue  # encode_users.py names them; they have no table to retrieve with
        means.append(mean_behaviour(record))
        behaviours.append(record.behaviours)
        rows = histories.rows[histories.of(user)]
        seen.append(np.unique(rows[rows >= 0]))
    if len(means) < 2:  # one chooses, the other measures
        raise DataError(
            "fewer than two users of the data have a table then: give a later --as_of, or leave "
            "--data out"
        )
    return Sample(
        means=np.stack(means),
        behaviours=np.array(behaviours, np.float64),
        seen=seen,
        words=f"{len(means)} of {len(users)} users of the data set",
    )


def report(folder: Path, manifest: IndexManifest) -> str:
    """Say what was made, where it lies and how good it is."""
    recall = manifest.recall
    size = sum(info.size for info in manifest.files.values()) / 1e6
    looked = (
        f"{manifest.nprobe} of {manifest.nlist} cells are searched"
        if manifest.nlist > 1
        else "all items are compared"
    )
    left_out = ", without what each had met" if recall.seen_excluded else ""
    return "\n".join(
        [
            f"{shown(folder)}: {manifest.items:,} items, {size:.1f} MB in {manifest.seconds:.1f} "
            f"s, fingerprint {manifest.fingerprint}",
            f"{looked}, recall at {recall.at} against exact search {recall.value:.4f} "
            f"({recall.users} of {recall.sample}{left_out})",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, report; what cannot be built ends with one line and exit code 2."""
    try:
        settings = parse(IndexSettings, arguments, __doc__)
        with disk_errors(Path(settings.output or settings.bundle or ".")):
            folder, manifest = build(settings)
    except (SettingsError, DataError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(folder, manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
