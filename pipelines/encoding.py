"""Histories to user records in a store, shard by shard, and the check of what came out."""

import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError
from hashtab.features.histories import Histories, HistoryReader
from hashtab.features.sources import TIME
from hashtab.features.storage import Array, map_arrow
from hashtab.pipelines.command_line import SettingsError
from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import BundleError
from hashtab.serving.store import (
    StoreError,
    TableOverflowError,
    TableStore,
    User,
    UserRecord,
    open_store,
    pack,
    sum_by_bucket,
    unpack,
)

_USERS_AT_ONCE = 256  # records of one transaction
_SAMPLE = 32  # users whose records are checked
_JOB = "encoding"  # name of the note of the job whose shards are noted
_COMPLETE = "complete"  # name of the note that all of its shards are


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What encoding one shard came to.

    Args:
        users: with a record.
        behaviours: before the moment.
        refused: user -> why it has no record.
    """

    users: int = 0
    behaviours: int = 0
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """One job: all users of a data set as of one moment, by one bundle, into one store.

    It can be sent to other processes, which must see all three at the same places. A finished
    shard is noted in the store, with its last records: a job begun again does what is left.

    Args:
        bundle: folder.
        bundle_digest: of the bundle's manifest.
        data: folder of the prepared data set.
        data_digest: of that data set.
        store: URL.
        as_of: microseconds since 1970 UTC; what had happened strictly before it is encoded.
    """

    bundle: str
    bundle_digest: str
    data: str
    data_digest: str
    store: str
    as_of: int

    @property
    def opened(self) -> Bundle:
        """The bundle in this process."""
        return open_bundle(self.bundle, self.bundle_digest)

    def __call__(self, shard: int) -> None:
        """Encode one shard; does nothing where the store says that it is done.

        Raises:
            StoreError: if the store cannot be written.
            BundleError, DataError: if this process sees another bundle or data set than the job's.
        """
        with open_store(self.store) as store:
            if self.done(store, shard) is None:
                self._encode(store, shard)

    def begin(self, store: TableStore) -> None:
        """Make this the store's job; what another one noted of its shards holds no longer.

        Its records are about to be replaced, perhaps only in part: begun again after that, it must
        not find them done.
        """
        fingerprint, mine = self.opened.layout.fingerprint, self._named()
        if store.note(fingerprint, _JOB) != mine:
            store.remove(fingerprint, [])
            store.put(fingerprint, {}, {_JOB: mine})

    def end(self, store: TableStore) -> None:
        """Note that every shard is done: from here on the tables are all of this job."""
        fingerprint, mine = self.opened.layout.fingerprint, self._named()
        if store.note(fingerprint, _COMPLETE) != mine:
            store.put(fingerprint, {}, {_COMPLETE: mine})

    def _encode(self, store: TableStore, shard: int) -> None:
        bundle = self.opened
        histories = self.histories(shard)
        users, refused = histories.users.to_list(), {}
        records: dict[User, bytes | None] = {}
        for i, user in enumerate(users):
            try:
                record = record_of_user(bundle, histories, i, self.as_of)
                records[user] = pack(record, bundle.layout)
            except TableOverflowError as error:
                refused[str(user)] = str(error)
                records[user] = None  # an older table must not pass for this one
            if len(records) == _USERS_AT_ONCE:
                store.put(bundle.layout.fingerprint, records)
                records = {}
        report = ShardReport(
            users=len(users) - len(refused),
            behaviours=int((histories.ends - histories.starts).sum()),
            refused=refused,
        )
        # In one transaction with the last records: each costs a sync of the disk.
        store.put(bundle.layout.fingerprint, records, {f"encoded {shard}": self._note(report)})

    def histories(self, shard: int) -> Histories:
        """Return the shard's histories as of the moment, in the ids of the bundle."""
        reader = open_histories(self.opened, self.data, self.data_digest)
        return reader.shard(shard).before(self.as_of)

    def done(self, store: TableStore, shard: int) -> ShardReport | None:
        """Return what this job noted of a finished shard, None where it is not finished."""
        note = store.note(self.opened.layout.fingerprint, f"encoded {shard}")
        plain = json.loads(note) if note else {}
        if plain.get("job") != self._identity():
            return None
        return ShardReport(**plain["report"])

    def _note(self, report: ShardReport) -> bytes:
        return json.dumps({"job": self._identity(), "report": report.__dict__}).encode()

    def _named(self) -> bytes:
        return json.dumps(self._identity()).encode()

    def _identity(self) -> dict[str, str | int]:
        return {"data": self.data_digest, "as_of": self.as_of}


def tables_of(store: TableStore, fingerprint: bytes) -> str | None:
    """Return what the store says that its tables are encoded from; None where it does not say.

    Raises:
        StoreError: if only a part of them is, and the rest of another moment or data set.
    """
    job, complete = store.note(fingerprint, _JOB), store.note(fingerprint, _COMPLETE)
    if job != complete:
        raise StoreError(
            f"users are being encoded into {store.name}, or were until it was stopped: its tables "
            "are not all of one moment. Wait, or run the same encode_users.py again"
        )
    return None if job is None else job.decode()


@lru_cache(maxsize=2)
def open_bundle(folder: str, digest: str) -> Bundle:
    """Return the bundle that a job began with, opened once a process.

    Raises:
        BundleError: if another one lies in the folder, or none that can be used.
    """
    bundle = Bundle.open(folder)
    if bundle.manifest.digest != digest:
        raise BundleError(
            f"{folder} holds the bundle {bundle.manifest.digest[:12]}, the job began with "
            f"{digest[:12]}: leave a bundle in its place until all is done, the same on every "
            "machine"
        )
    return bundle


@lru_cache(maxsize=2)
def open_histories(bundle: Bundle, data: str, data_digest: str) -> HistoryReader:
    """Return a reader of a data set's histories in the ids of a bundle, opened once a process.

    Raises:
        DataError: if it is another data set, is not finished, lacks a feature that the bundle
            reads, or names users by numbers where the bundle has text, or by text for numbers.
    """
    dataset = Dataset.open(data)
    if dataset.manifest.digest != data_digest:
        raise DataError(
            f"{data} holds the data set {dataset.manifest.digest[:12]} here, the job began with "
            f"{data_digest[:12]}: leave a data set in its place until all is done"
        )
    side = {name: bundle.encoders[name] for name in bundle.manifest.side}
    reader = HistoryReader(dataset.folder, bundle.catalogue, side)
    if reader.text_users != bundle.manifest.text_users:
        kinds = {True: "text", False: "whole numbers"}
        raise DataError(
            f"users are {kinds[reader.text_users]} in {data}, the model knows them as "
            f"{kinds[bundle.manifest.text_users]}: prepare the data with users of one type"
        )
    return reader


def record_of_user(bundle: Bundle, histories: Histories, user: int, as_of: int) -> UserRecord:
    """Return the record of the user with this index, from what the histories hold.

    Raises:
        TableOverflowError: if a sum or a behaviour's vector leaves the fixed point.
    """
    kept = histories.of(user)
    rows = histories.rows[kept]
    return bundle.record(_behaviours(bundle, histories, kept), histories.times[kept], rows, as_of)


def _behaviours(bundle: Bundle, histories: Histories, kept: slice) -> dict[str, Array]:
    names = [f.name for f in bundle.manifest.features.behaviour if f.name in bundle.manifest.items]
    side = {name: column[kept] for name, column in histories.side.items()}
    return side | bundle.catalogue.columns(histories.rows[kept], names)


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


def absolute_store(store: str) -> str:
    """Name an LMDB folder by its absolute path: workers have working directories of their own."""
    return store if "://" in store else str(Path(store.removeprefix("lmdb:")).resolve())


def verify_sample(encoding: Encoding, reports: list[ShardReport]) -> int:
    """Hold records of some users, spread over the shards, against their definition.

    Args:
        encoding: that is done.
        reports: of all shards.

    Returns:
        How many records were held.

    Raises:
        StoreError: if one differs.
    """
    random = np.random.default_rng(encoding.as_of % 2**32)
    chosen, checked = random.integers(len(reports), size=_SAMPLE), 0
    with open_store(encoding.store, readonly=True) as store:
        for shard, count in zip(*np.unique(chosen, return_counts=True), strict=True):
            histories = encoding.histories(int(shard))
            users = random.choice(len(histories), min(count, len(histories)), replace=False)
            for user in users.tolist():
                if str(histories.users[user]) not in reports[shard].refused:
                    verify_user(encoding, store, histories, user)
                    checked += 1
    return checked


def verify_user(encoding: Encoding, store: TableStore, histories: Histories, user: int) -> None:
    """Hold a stored record against its definition, bit for bit.

    Table: the plain sum of all behaviours' vectors. Counters: the behaviours counted one by one.

    Raises:
        StoreError: if there is no record, it is damaged, or it differs.
    """
    bundle = encoding.opened
    name = histories.users[user]
    (stored,) = store.get(bundle.layout.fingerprint, [name])
    if stored is None:
        raise StoreError(f"user {name!r} has no record in {store.name}, though its shard is done")
    try:
        record = unpack(stored, bundle.layout)
    except StoreError as error:
        raise StoreError(
            f"user {name!r} in {store.name}: {error}, with python -m hashtab.serving.store verify "
            "STORE --remove, and encode again"
        ) from error
    kept = histories.of(user)
    rows, times = histories.rows[kept], histories.times[kept]
    behaviours = _behaviours(bundle, histories, kept)
    limit = bundle.manifest.history_limit or len(rows)
    recent = slice(max(len(rows) - bundle.layout.recent, 0), None)
    alike = {
        "number of behaviours": record.behaviours == min(len(rows), limit),
        "table": np.array_equal(record.table, _defined_table(bundle, behaviours, limit)),
        "recent behaviours": np.array_equal(record.recent_times, times[recent])
        and all(np.array_equal(c, behaviours[n][recent]) for n, c in record.recent.items()),
        "counters": all(
            dict(zip(keys.tolist(), counts.tolist(), strict=True))
            == Counter(v for v in bundle.catalogue.counted(counter)[rows].tolist() if v)
            for counter, (keys, counts) in record.counters.items()
        ),
        "watermark": record.watermark == encoding.as_of,
    }
    wrong = [part for part, same in alike.items() if not same]
    if wrong:
        raise StoreError(
            f"the {' and '.join(wrong)} of user {name!r} in {store.name} are not those of the "
            "user's history: was it changed meanwhile? Encode again after dropping the fingerprint"
        )


def _defined_table(bundle: Bundle, behaviours: dict[str, Array], limit: int) -> Array:
    last = {name: column[max(len(column) - limit, 0) :] for name, column in behaviours.items()}
    if not bundle.layout.groups or not len(next(iter(last.values()))):
        return np.zeros(bundle.layout.shape, np.int64)
    _, codes, vectors = bundle.encode(last)
    return sum_by_bucket(codes, vectors, bundle.layout.buckets)
