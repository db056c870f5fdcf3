"""Requests and user records made at random from what a bundle knows."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from hashtab.features.encoders import FIRST_ID, Encoder, Vocabulary
from hashtab.features.manifest import Feature
from hashtab.features.samples import time_features
from hashtab.features.storage import Array
from hashtab.serving.bundle import Bundle, Candidates
from hashtab.serving.store import (
    DELTA_LIMIT,
    SCALE,
    Change,
    Head,
    User,
    UserRecord,
    extended,
    first_delta,
    open_store,
    pack,
    row_type,
    unpack,
)

_FIRST_OWN = 10**12  # beyond the users of any data set
_AT_ONCE = 64  # records of one transaction
_DISTINCT = 200  # requests that a load repeats in turn
REQUEST_TIME = "2024-03-01T12:00:00"


def own_user(bundle: Bundle, number: int) -> User:
    """Return a user that no data set has."""
    return f"own-{number}" if bundle.manifest.text_users else _FIRST_OWN + number


def score_body(
    bundle: Bundle, user: User, count: int, random: np.random.Generator
) -> dict[str, Any]:
    """Return what is asked of `/v1/score`: items of the catalogue, and one context for all."""
    manifest = bundle.manifest
    rows = random.integers(0, len(bundle.catalogue), count)
    body: dict[str, Any] = {"user": user, "items": bundle.catalogue.items.gather(rows).to_list()}
    names = [f.name for f in manifest.features.context if f.name not in manifest.time_features]
    body["context"] = {name: raw_value(bundle.encoders[name], random) for name in names}
    if manifest.time_features:
        body["time"] = REQUEST_TIME
    return body


def raw_value(encoder: Encoder, random: np.random.Generator) -> int | float | str:
    """Return a value that an encoder knows."""
    if isinstance(encoder, Vocabulary):
        return encoder.values[int(random.integers(len(encoder.values)))]
    return float(random.normal(encoder.mean, encoder.std))


def score_bodies(
    bundle: Bundle, users: list[User], count: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Return different requests of users drawn at random."""
    random = np.random.default_rng(seed)
    drawn = [users[i] for i in random.integers(0, len(users), _DISTINCT)]
    return [score_body(bundle, user, count, random) for user in drawn]


class Events:
    """Events of items of a catalogue, each with an id of its own.

    Args:
        bundle: whose items and side features they have.
        tag: begin of the ids.
    """

    def __init__(self, bundle: Bundle, tag: str) -> None:
        self._items = bundle.catalogue.items.to_list()
        self._side = {name: bundle.encoders[name] for name in bundle.manifest.side}
        self._random = np.random.default_rng(sum(tag.encode()))
        self._tag, self._count = tag, 0

    def make(self, user: User, time_us: int, item: int | str | None = None) -> dict[str, Any]:
        """Return one event, of a random item unless one is named."""
        self._count += 1
        if item is None:
            item = self._items[int(self._random.integers(len(self._items)))]
        return {
            "id": f"{self._tag}-{self._count}",
            "user": user,
            "item": item,
            "time": time_us,
            "side": {name: raw_value(side, self._random) for name, side in self._side.items()},
        }


def offline_scores(bundle: Bundle, record: UserRecord, body: Mapping[str, Any]) -> list[float]:
    """Return what a request must be answered: by the ways of batch scoring, without a server."""
    manifest, count = bundle.manifest, len(body["items"])
    rows = bundle.catalogue.rows(pl.Series(body["items"]))
    raw = {name: pl.Series(name, [value]) for name, value in body["context"].items()}
    encoded = [s.to_frame().select(bundle.encoders[n].encode(pl.col(n))) for n, s in raw.items()]
    columns = [frame.to_series() for frame in encoded]
    if manifest.time_features:
        time = pl.Series([datetime.fromisoformat(body["time"])]).dt.epoch("us")
        columns += time_features(manifest.time_features, time)
    names = [f.name for f in manifest.features.candidate]
    candidates = Candidates(
        features=bundle.catalogue.columns(rows, names),
        context={column.name: np.repeat(column.to_numpy(), count) for column in columns},
        counters=bundle.counters(record, rows),
    )
    scores: list[float] = bundle.score(record, candidates).tolist()
    return scores


def add_users(bundle: Bundle, store: str, lengths: Mapping[User, int]) -> None:
    """Put records of histories of so many behaviours, drawn from the catalogue, into a store.

    Each has a delta that is half full, as those of a user have on the mean whose events stream in.
    """
    with open_store(store) as opened:
        numbered = list(enumerate(lengths.items()))
        for start in range(0, len(numbered), _AT_ONCE):
            some = numbered[start : start + _AT_ONCE]
            records = {user: record_of_length(bundle, n, seed=i) for i, (user, n) in some}
            deltas = {user: _half_full(bundle, record) for user, record in records.items()}
            opened.change([], partial(_put, bundle.layout.fingerprint, records, deltas))


def _put(
    fingerprint: bytes,
    records: dict[User, bytes],
    deltas: dict[User, bytes | None],
    change: Change,
) -> None:
    change.put_records(fingerprint, records, deltas)


def _half_full(bundle: Bundle, data: bytes) -> bytes | None:
    """Return a delta of random behaviours."""
    layout, random = bundle.layout, np.random.default_rng(len(data))
    record = unpack(data, layout)
    before = Head(events=record.behaviours, watermark=record.watermark, revision=record.revision)
    rows = np.zeros(DELTA_LIMIT // 2, row_type(layout))
    rows["in_table"] = rows["in_log"] = 1
    rows["time"] = record.watermark
    rows["codes"] = random.integers(0, layout.buckets, rows["codes"].shape)
    rows["vector"] = random.integers(-SCALE, SCALE, rows["vector"].shape)
    rows["counted"] = random.integers(1, 1000, rows["counted"].shape)
    first = first_delta(data, record.table, before)
    return first and extended(first, rows, before, replace(before, revision=1))


def record_of_length(bundle: Bundle, length: int, seed: int) -> bytes:
    """Return a record whose history is drawn from the catalogue, a behaviour a second."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, len(bundle.catalogue), length)
    manifest = bundle.manifest
    features = manifest.features.behaviour
    columns = bundle.catalogue.columns(rows, [f.name for f in features if f.name in manifest.items])
    columns |= {f.name: _side(f, length, random) for f in features if f.name in manifest.side}
    times = np.arange(length, dtype=np.int64) * 1_000_000
    record = bundle.record(columns, times, rows, watermark=length * 1_000_000)
    orders = np.arange(len(record.recent_times), dtype=np.uint64)
    return pack(replace(record, events=orders), bundle.layout)


def _side(feature: Feature, length: int, random: np.random.Generator) -> Array:
    if feature.kind == "numeric":
        return random.normal(size=length).astype(np.float32)
    return random.integers(FIRST_ID, feature.size, length).astype(np.int32)
