"""Samples of one shard: requests, labels and context, from exposures or from an exposure rule."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from hashtab.features import negatives
from hashtab.features.encoders import FIRST_ID, UNKNOWN_ID
from hashtab.features.negatives import Candidates
from hashtab.features.schema import Negatives, Schema
from hashtab.features.sources import LABEL, PERIOD, SESSION, SPLIT, TIME
from hashtab.features.statistics import FIRST_TIME, TRAIN_COUNT, UNTIL
from hashtab.features.storage import Array, map_arrow
from hashtab.features.tables import CODE, INDEX, KEY, ROW

GROUP = "_group"
_HOUR_US = 3_600_000_000
_DAY_US = 24 * _HOUR_US
_EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday, Monday is 0
_ROW_BITS = 32

TIME_FEATURE_SIZES = {"hour": FIRST_ID + 24, "weekday": FIRST_ID + 7}


@dataclass(frozen=True)
class Drawn:
    """Samples of one negative scheme; `missed` draws found no free item and are left out."""

    samples: pl.DataFrame
    missed: int


def with_time_features(schema: Schema, samples: pl.DataFrame) -> pl.DataFrame:
    """Add the declared features of the request's time (UTC) as ids."""
    return samples.with_columns(time_features(schema.context.time, samples[TIME]))


def time_features(names: Iterable[str], times: pl.Series) -> list[pl.Series]:
    """Return features of times, microseconds since 1970 UTC, as ids; a missing time is unknown."""
    made = {
        "hour": times // _HOUR_US % 24,
        "weekday": (times // _DAY_US + _EPOCH_WEEKDAY) % 7,
    }
    return [
        (made[name] + FIRST_ID).cast(pl.Int32).fill_null(UNKNOWN_ID).alias(name) for name in names
    ]


class ExposureRule:
    """Positives and negatives of one shard of a log without exposures.

    Args:
        schema: of the data set.
        folder: the folder being built.
    """

    def __init__(self, schema: Schema, folder: Path) -> None:
        self.schema = schema
        popularity = map_arrow(folder / "tables" / "popularity.arrow")
        self.train_counts = popularity[TRAIN_COUNT]
        self.pool = map_arrow(folder / "work" / "pool.arrow") if schema.pool else None
        if self.pool is not None:
            until = map_arrow(folder / "work" / "until.arrow")[UNTIL]
            self.candidates = Candidates(self.pool[ROW], until)
            return
        known = np.flatnonzero(self.train_counts > 0)
        by_age = known[np.argsort(popularity[FIRST_TIME][known], kind="stable")]
        self.first_times = popularity[FIRST_TIME][by_age]
        self.candidates = Candidates.of(by_age, self.train_counts)

    def requested(self, behaviours: pl.DataFrame) -> pl.DataFrame:
        """Each user's item once a period, at its first request, with its group.

        A session is one request, made at its first time, and belongs to the split of that time.
        """
        requests = behaviours
        if SESSION in behaviours.columns:
            requests = requests.with_columns(pl.col(TIME, SPLIT).min().over(INDEX, SESSION))
        period = PERIOD if PERIOD in behaviours.columns else TIME
        # A rank within the shard: group and catalogue row together fit one 64-bit code.
        group = pl.struct(INDEX, period).rank("dense").cast(pl.Int64)
        order = [c for c in requests.columns if c not in (INDEX, ROW)]
        return (
            requests.with_columns(group.alias(GROUP))
            .sort(INDEX, ROW, *order)
            .unique([GROUP, ROW], keep="first", maintain_order=True)
        )

    def positives(self, requested: pl.DataFrame) -> pl.DataFrame:
        """Requested items that were on offer and had a behaviour in training time."""
        trained = self.train_counts[requested[ROW].to_numpy()] > 0
        if self.pool is None:
            return self._ordered(requested.filter(trained))
        shown = requested.filter(pl.Series(trained) & pl.col(KEY).is_not_null())
        codes = shown[KEY].to_numpy() * len(self.train_counts) + shown[ROW].to_numpy()
        position = np.searchsorted(self.pool[CODE], codes)
        position = np.minimum(position, len(self.pool[CODE]) - 1)
        found = self.pool[CODE][position] == codes
        return self._ordered(self._shown_as(shown.filter(pl.Series(found)), position[found]))

    def _ordered(self, positives: pl.DataFrame) -> pl.DataFrame:
        return positives.sort(INDEX, TIME, ROW, GROUP)

    def _shown_as(self, samples: pl.DataFrame, positions: Array) -> pl.DataFrame:
        """Add the pool's context features at the given positions."""
        if self.pool is None or self.schema.pool is None:
            return samples
        names = (*self.schema.pool.categorical, *self.schema.pool.numeric)
        return samples.with_columns(pl.Series(n, self.pool[n][positions]) for n in names)

    def _ranges(self, positives: pl.DataFrame) -> tuple[Array, Array]:
        if self.pool is None:
            ends = np.searchsorted(self.first_times, positives[TIME].to_numpy(), side="left")
            return np.zeros_like(ends), ends
        keys = positives[KEY].to_numpy() * len(self.train_counts)
        code = self.pool[CODE]
        return np.searchsorted(code, keys), np.searchsorted(code, keys + len(self.train_counts))

    def draw(
        self, rule: Negatives, positives: pl.DataFrame, requested: pl.DataFrame, hashes: Array
    ) -> Drawn:
        """Positives together with the negatives of one scheme."""
        starts, ends = self._ranges(positives)
        taken = (requested[GROUP].to_numpy() << _ROW_BITS) + requested[ROW].to_numpy()
        drawn = negatives.draw(
            rule,
            self.candidates,
            starts,
            ends,
            _identities(positives, hashes),
            positives[GROUP].to_numpy(),
            np.sort(taken),
        )
        found = drawn >= 0
        origin = np.repeat(np.arange(positives.height), rule.per_positive)[found]
        rows = pl.Series(ROW, self.candidates.rows[drawn[found]], dtype=pl.Int32)
        shown = self._shown_as(positives[origin].with_columns(rows), drawn[found])
        both = pl.concat(
            [
                positives.with_columns(pl.lit(1, pl.Int8).alias(LABEL)),
                shown.with_columns(pl.lit(0, pl.Int8).alias(LABEL)),
            ]
        )
        return Drawn(with_time_features(self.schema, both), missed=int(np.sum(~found)))


def _identities(positives: pl.DataFrame, hashes: Array) -> Array:
    """Hash of each positive's user, request time and place within that request's positives."""
    place = positives.select(pl.int_range(pl.len()).over(INDEX, TIME)).to_series()
    user = hashes[positives[INDEX].to_numpy()]
    time = positives[TIME].to_numpy().astype(np.uint64)
    return negatives.mix(negatives.mix(user, time), place.to_numpy().astype(np.uint64))


def evaluation_splits(samples: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Cut samples by their split."""
    names = ("train", "validation", "test")
    return {name: samples.filter(pl.col(SPLIT) == i).drop(SPLIT) for i, name in enumerate(names)}
