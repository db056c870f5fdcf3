"""One user shard: histories once per user and samples that point into them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl

from hashtab.features import encoders
from hashtab.features.catalogue import Catalogue
from hashtab.features.counters import count_before
from hashtab.features.encoders import Scaler
from hashtab.features.manifest import SplitInfo
from hashtab.features.partition import read_rows
from hashtab.features.samples import (
    TIME_FEATURE_SIZES,
    ExposureRule,
    evaluation_splits,
    with_time_features,
)
from hashtab.features.schema import SPLITS, Schema
from hashtab.features.sources import EVENT, LABEL, SPLIT, TIME, sha256
from hashtab.features.storage import Array, frame_of, write_arrow, write_text
from hashtab.features.tables import HASH, INDEX, ROW

HISTORY_END, ITEM_COUNT = "_history_end", "_item_count"


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What one shard wrote; its existence says that the shard is complete.

    Args:
        users: with a behaviour or a sample.
        behaviours: kept.
        duplicates: exact duplicate rows dropped, by log.
        missed_negatives: draws that found no free item, by scheme.
        with_history: samples that see at least one behaviour.
        splits: sizes by split.
        files: sha256 by path inside the data set.
    """

    users: int
    behaviours: int
    duplicates: dict[str, int]
    missed_negatives: dict[str, int]
    with_history: int
    splits: dict[str, SplitInfo]
    files: dict[str, str]


def split_names(schema: Schema) -> tuple[str, ...]:
    """Main splits, then validation and test of each further negative scheme."""
    further = [f"{s}_{rule.name}" for rule in schema.negatives[1:] for s in SPLITS[1:]]
    return (*SPLITS, *further)


def prepare_shard(schema: Schema, folder: Path, shard: int) -> None:
    """Write a shard's histories and samples; does nothing where they are complete.

    Args:
        schema: of the data set.
        folder: the folder being built, with `tables/` and `work/` in place.
        shard: number of the shard.
    """
    record_path = folder / "work" / "shards" / f"{shard:05d}.json"
    if record_path.exists():
        return
    record = _ShardWriter(schema, folder, shard).write()
    write_text(record_path, json.dumps(asdict(record)))


class _ShardWriter:
    def __init__(self, schema: Schema, folder: Path, shard: int) -> None:
        self.schema = schema
        self.folder = folder
        self.shard = shard
        self.catalogue = Catalogue.read(folder / "tables" / "catalogue.arrow", schema.item_name)
        self.encoders = encoders.load(folder / "tables" / "encoders.json")
        self.duplicates: dict[str, int] = {}
        self.missed: dict[str, int] = {}
        self.files: dict[str, str] = {}

    def write(self) -> ShardRecord:
        log = self._read("behaviours")
        history = log.sort(INDEX, TIME, ROW, *_rest(log))
        splits = {name: self._point(history, part) for name, part in self._samples(log)}
        users = np.unique(
            np.concatenate([f[INDEX].to_numpy() for f in (history, *splits.values())])
        )
        side = (*self.schema.side_categorical, *self.schema.side_numeric)
        self._store("histories", history.select(ROW, TIME, *side))
        ends = {"history": _ends(users, history)}
        for name, samples in splits.items():
            ends[name] = _ends(users, samples)
            self._store(f"samples/{name}", samples)
        self._store("users", frame_of({INDEX: users, **{f"{n}_end": e for n, e in ends.items()}}))
        return ShardRecord(
            users=len(users),
            behaviours=history.height,
            duplicates=self.duplicates,
            missed_negatives=self.missed,
            with_history=sum(int((s[HISTORY_END] > 0).sum()) for s in splits.values()),
            splits={name: _sizes(samples) for name, samples in splits.items()},
            files=self.files,
        )

    def _read(self, name: str) -> pl.DataFrame:
        """Events of a log, those that were delivered twice once."""
        rows = read_rows(self.folder, name, self.shard)
        once = rows.unique()
        self.duplicates[name] = rows.height - once.height
        return once.drop(EVENT).with_columns(
            encoder.encode(pl.col(name)).alias(name)
            for name, encoder in self.encoders.items()
            if isinstance(encoder, Scaler) and name in once.columns
        )

    def _samples(self, log: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
        if self.schema.exposures is not None:
            exposures = self._read("exposures")
            yield from evaluation_splits(with_time_features(self.schema, exposures)).items()
            return
        rule = ExposureRule(self.schema, self.folder)
        requested = rule.requested(log)
        positives = rule.positives(requested)
        hashes = pl.read_ipc(self.folder / "tables" / "users.arrow", columns=[HASH])[
            HASH
        ].to_numpy()
        for i, scheme in enumerate(self.schema.negatives):
            wanted = positives if i == 0 else positives.filter(pl.col(SPLIT) > 0)
            drawn = rule.draw(scheme, wanted, requested, hashes)
            self.missed[scheme.name] = drawn.missed
            for name, samples in evaluation_splits(drawn.samples).items():
                if i == 0:
                    yield name, samples
                elif name != "train":
                    yield f"{name}_{scheme.name}", samples

    def _point(self, history: pl.DataFrame, samples: pl.DataFrame) -> pl.DataFrame:
        """Add history ends and counters, all of strictly earlier behaviours; sort by time."""
        user, time, row = (history[name].to_numpy() for name in (INDEX, TIME, ROW))
        asked, request, candidate = (samples[name].to_numpy() for name in (INDEX, TIME, ROW))
        counted = {HISTORY_END: count_before(user, time, asked, request)}
        for name in self._stored_counters():
            values = self.catalogue.counted(name)
            width = int(values.max()) + 1
            groups, asked_groups = user * width + values[row], asked * width + values[candidate]
            met = count_before(groups, time, asked_groups, request)
            counted[counter_column(self.schema, name)] = np.where(values[candidate] > 0, met, 0)
        counts = frame_of({name: c.astype(np.int32) for name, c in counted.items()})
        context = self._context_names()
        narrow = {name: pl.col(name).cast(self._id_type(name)) for name in context}
        return (
            pl.concat([samples, counts], how="horizontal")
            .select(pl.col(INDEX).cast(pl.Int32), TIME, ROW, *counts.columns, LABEL, **narrow)
            .sort(INDEX, TIME, ROW, LABEL, *context)
        )

    def _stored_counters(self) -> list[str]:
        item = self.schema.item_name  # counted for every data set, since metrics are sliced by it
        return [item, *(name for name in self.schema.counters if name != item)]

    def _context_names(self) -> list[str]:
        pool, context = self.schema.pool, self.schema.context
        shown = (*pool.categorical, *pool.numeric) if pool else ()
        return [*context.time, *context.categorical, *context.numeric, *shown]

    def _id_type(self, name: str) -> type[pl.DataType]:
        """The smallest type that holds a context feature; there are many samples."""
        encoder = self.encoders.get(name)
        if isinstance(encoder, Scaler):
            return pl.Float32
        size = TIME_FEATURE_SIZES[name] if encoder is None else encoder.size
        return pl.UInt8 if size <= 1 << 8 else pl.UInt16 if size <= 1 << 16 else pl.Int32

    def _store(self, name: str, frame: pl.DataFrame) -> None:
        relative = f"{name}/{self.shard:05d}.arrow"
        write_arrow(self.folder / relative, frame)
        self.files[relative] = sha256(self.folder / relative)


def counter_column(schema: Schema, name: str) -> str:
    """Name of a counter's column among the stored samples."""
    return ITEM_COUNT if name == schema.item_name else f"_count_{name}"


def _rest(frame: pl.DataFrame) -> list[str]:
    return [name for name in frame.columns if name not in (INDEX, TIME, ROW)]


def _ends(users: Array, frame: pl.DataFrame) -> Array:
    return np.searchsorted(frame[INDEX].to_numpy(), users, side="right").astype(np.int64)


def _sizes(samples: pl.DataFrame) -> SplitInfo:
    return SplitInfo(
        users=samples[INDEX].n_unique(),
        requests=samples.select(INDEX, TIME).n_unique(),
        samples=samples.height,
        positives=int(samples[LABEL].sum()),
    )
