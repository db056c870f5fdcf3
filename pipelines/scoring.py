"""Scores one part of a file of requests after another, each part written whole or not at all."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from hashtab.features.histories import Histories
from hashtab.features.samples import time_features
from hashtab.features.storage import Array
from hashtab.pipelines.encoding import (
    open_bundle,
    open_histories,
    record_of_user,
    tables_of,
)
from hashtab.pipelines.outputs import Job, write_durably
from hashtab.pipelines.requests import CANDIDATE, CANDIDATES, REQUEST, TIME_COLUMN, USER_COLUMN
from hashtab.serving.bundle import Bundle, Candidates
from hashtab.serving.store import (
    CorruptRecordError,
    ForeignRecordError,
    StoreError,
    TableOverflowError,
    User,
    UserRecord,
    open_store,
    unpack,
)

HISTORY, UNKNOWN, MISSING, SCORES, SCORE = (
    "history",
    "unknown_candidates",
    "missing_context",
    "scores",
    "score",
)
STORED, ENCODED, EMPTY = "stored", "encoded", "empty"
_AT_ONCE = 4096  # candidates of one call
_USERS_AT_ONCE = 256
_BYTES_AT_ONCE = 1 << 26  # of their tables in memory


@dataclass(frozen=True, kw_only=True)
class Scoring(Job):
    """One job of requests of a click model.

    Args:
        one_a_row: whether a row of requests and scores is a candidate and not a request.
        store: URL of the user tables; None for none.
        tables: what the store says that they were encoded from; None where it does not say.
        data: prepared data set, whose histories are encoded where a user has no table.
        data_digest: of that data set.
        as_of: microseconds; of these histories what is earlier counts.
        top: candidates kept of a request, best first; all, in the order asked, when None.
    """

    one_a_row: bool
    store: str | None
    tables: str | None = None
    data: str | None
    data_digest: str | None
    as_of: int | None
    top: int | None

    @property
    def opened(self) -> Bundle:
        """The bundle in this process."""
        return open_bundle(self.bundle, self.bundle_digest)

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the scores; bundle and data may have moved."""
        asked = ("bundle_digest", "requests", "rows", "store", "tables")
        names = (*asked, "data_digest", "as_of", "top")
        return {name: getattr(self, name) for name in names}

    def __call__(self, number: int) -> list[str]:
        """Score one part; does nothing where its file is there.

        Returns:
            A line for each user whose table could not be used.

        Raises:
            BundleError, DataError: if this process sees another bundle or data set than the job's.
            StoreError: if the store was encoded anew since the job began.
        """
        target = self.part(number)
        if target.exists():
            return []
        scores, said = self.score(self.requests_of(number))
        self._check_same_tables()
        write_durably(target, scores)
        return said

    def _check_same_tables(self) -> None:
        """Check that what was just read is what the job began with, before it is kept."""
        if self.store is None:
            return
        with open_store(self.store, readonly=True) as store:
            if tables_of(store, self.opened.layout.fingerprint) != self.tables:
                raise StoreError(
                    f"users were encoded anew into {store.name} while it was read: remove "
                    f"{self.output} and score again"
                )

    def score(self, requests: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
        """Return the scores of requests, a row each, in their order, and what is to be said."""
        asked = _Asked(self.opened, requests)
        users = _Users(self)
        for some in asked.users(_users_at_once(asked.bundle)):
            for user, (record, source) in users.records(some).items():
                asked.score(user, record, source)
        return asked.answers(self.top, self.one_a_row), users.said


class _Asked:
    """Requests as arrays of candidates, and their scores as they come."""

    def __init__(self, bundle: Bundle, requests: pl.DataFrame) -> None:
        self.bundle = bundle
        self.requests = requests
        lengths = requests[CANDIDATES].list.len().to_numpy().astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.request_of = np.repeat(np.arange(len(lengths)), lengths)
        self.rows = bundle.catalogue.rows(requests[CANDIDATES].explode(empty_as_null=False))
        self.context, self.missing = self._context()
        features = [f.name for f in bundle.manifest.features.candidate]
        self.features = bundle.catalogue.columns(self.rows, features)
        self.scores = np.zeros(len(self.rows), np.float32)
        self.sources = np.full(len(requests), EMPTY, dtype=object)
        # Numbers of the requests by user, in the order of the users' first requests.
        self._of_user: dict[User | None, list[int]] = {}
        for i, user in enumerate(requests[USER_COLUMN].to_list()):
            self._of_user.setdefault(user, []).append(i)

    def users(self, at_once: int) -> list[list[User | None]]:
        """Return the users that ask, so many at a time."""
        every = list(self._of_user)
        return [every[start : start + at_once] for start in range(0, len(every), at_once)]

    def score(self, user: User | None, record: UserRecord, source: str) -> None:
        """Score all candidates of a user's requests."""
        requests = self._of_user[user]
        self.sources[requests] = source
        for request in requests:
            self._score(record, *self.offsets[request : request + 2].tolist())

    def _score(self, record: UserRecord, begin: int, end: int) -> None:
        # A call holds one request alone: a runtime may round otherwise in a call of another size,
        # and scores must not depend on what else the part or the user asks.
        for start in range(begin, end, _AT_ONCE):
            some = slice(start, min(start + _AT_ONCE, end))
            candidates = Candidates(
                features={name: column[some] for name, column in self.features.items()},
                context={name: column[some] for name, column in self.context.items()},
                counters=self.bundle.counters(record, self.rows[some]),
            )
            self.scores[some] = self.bundle.score(record, candidates)

    def _context(self) -> tuple[dict[str, Array], NDArray[np.bool_]]:
        """Encode each context feature to a value a candidate; say where a raw one is missing."""
        manifest, encoders = self.bundle.manifest, self.bundle.encoders
        missing = np.zeros(len(self.request_of), bool)
        columns: dict[str, Array] = {}
        for feature in manifest.features.context:
            if feature.name in manifest.time_features:
                continue
            raw = self.requests[feature.name]
            listed = isinstance(raw.dtype, pl.List)
            raw = raw.explode(empty_as_null=False) if listed else raw.gather(self.request_of)
            encoded = raw.to_frame().select(encoders[feature.name].encode(pl.col(feature.name)))
            columns[feature.name] = encoded.to_series().to_numpy()
            there = raw.is_finite() if raw.dtype.is_float() else raw.is_not_null()
            missing |= ~there.fill_null(False).to_numpy()
        if manifest.time_features:
            times = self.requests[TIME_COLUMN].gather(self.request_of)
            made = time_features(manifest.time_features, times)
            columns |= {column.name: column.to_numpy() for column in made}
            missing |= times.is_null().to_numpy()
        return columns, missing

    def answers(self, top: int | None, one_a_row: bool) -> pl.DataFrame:
        """Return a row for each request, or for each candidate."""
        number = pl.Series("_number", self.request_of)
        flat = pl.DataFrame(
            {
                "_number": number,
                CANDIDATES: self.requests[CANDIDATES].explode(empty_as_null=False),
                SCORES: self.scores,
            }
        )
        if top is not None:
            flat = flat.sort("_number", SCORES, descending=[False, True], maintain_order=True)
            flat = flat.group_by("_number", maintain_order=True).head(top)
        per_request = flat.group_by("_number", maintain_order=True).agg(CANDIDATES, SCORES)
        whole = (
            self.requests.select(REQUEST, USER_COLUMN)
            .with_row_index("_number")
            .with_columns(pl.col("_number").cast(pl.Int64))
            .join(per_request, on="_number", how="left", maintain_order="left")
            .with_columns(
                pl.col(CANDIDATES, SCORES).fill_null([]),
                pl.Series(HISTORY, self.sources.tolist(), dtype=pl.String),
                self._count(UNKNOWN, self.rows < 0),
                self._count(MISSING, self.missing),
            )
            .drop("_number")
        )
        if not one_a_row:
            return whole
        return whole.explode(CANDIDATES, SCORES).rename({CANDIDATES: CANDIDATE, SCORES: SCORE})

    def _count(self, name: str, flags: Array) -> pl.Series:
        counts = np.bincount(self.request_of[flags], minlength=len(self.requests))
        return pl.Series(name, counts.astype(np.uint32))


class _Users:
    """The records of users: stored, else encoded from histories, else empty."""

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring
        self.bundle = scoring.opened
        self.empty = UserRecord.empty(self.bundle.layout)
        self.said: list[str] = []

    def records(self, users: list[User | None]) -> dict[User | None, tuple[UserRecord, str]]:
        """Return the record of each user and where it comes from."""
        known = [user for user in users if user is not None]
        found = self._stored(known)
        found |= self._encoded([user for user in known if user not in found])
        return {user: found.get(user, (self.empty, EMPTY)) for user in users}

    def _stored(self, users: list[User]) -> dict[User | None, tuple[UserRecord, str]]:
        if self.scoring.store is None:
            return {}
        layout = self.bundle.layout
        found: dict[User | None, tuple[UserRecord, str]] = {}
        with open_store(self.scoring.store, readonly=True) as store:
            for user, data in zip(users, store.get(layout.fingerprint, users), strict=True):
                if data is None:
                    continue
                try:
                    found[user] = unpack(data, layout), STORED
                except (CorruptRecordError, ForeignRecordError) as error:
                    self.said.append(f"user {user!r} in {store.name}: {error}; not used")
        return found

    def _encoded(self, users: list[User]) -> dict[User | None, tuple[UserRecord, str]]:
        if self.scoring.data is None:
            return {}
        scoring = self.scoring
        reader = open_histories(self.bundle, scoring.data, scoring.data_digest)
        found: dict[User | None, tuple[UserRecord, str]] = {}
        by_shard: dict[int, list[User]] = {}
        for user in users:
            by_shard.setdefault(reader.shard_of(user), []).append(user)
        for shard, some in by_shard.items():
            histories = reader.shard(shard).before(self.scoring.as_of)
            for user, index in _places(histories, some).items():
                try:
                    record = record_of_user(self.bundle, histories, index, 0)
                except TableOverflowError as error:
                    self.said.append(f"user {user!r}: {error}; scored with an empty history")
                else:
                    found[user] = record, ENCODED
        return found


def _places(histories: Histories, users: list[User]) -> dict[User, int]:
    known = {user: i for i, user in enumerate(histories.users.to_list())}
    return {user: known[user] for user in users if user in known}


def _users_at_once(bundle: Bundle) -> int:
    table = 4 * max(1, math.prod(bundle.layout.shape))
    return min(_USERS_AT_ONCE, max(1, _BYTES_AT_ONCE // table))
