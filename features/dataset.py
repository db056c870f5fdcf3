"""The loader: batches of whole users from memory-mapped shards, ragged, each history once."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hashtab.features import encoders
from hashtab.features.encoders import Encoder
from hashtab.features.errors import DataError
from hashtab.features.manifest import Manifest
from hashtab.features.shards import HISTORY_END, ITEM_COUNT, counter_column
from hashtab.features.sources import LABEL, sha256
from hashtab.features.storage import Array, map_arrow
from hashtab.features.tables import INDEX, ROW

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

_DTYPES = {"categorical": np.int32, "numeric": np.float32}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Whole users: each history once, all samples of its user beside it.

    Shapes: B users, N behaviours, Q samples, K counters.

    Args:
        users: `[B]` int64, index of the user in the data set.
        history_offsets: `[B + 1]` int64, where each user's behaviours begin and end.
        behaviours: feature name -> `[N]`, int32 ids or float32, in time order within a user.
        sample_offsets: `[B + 1]` int64, where each user's samples begin and end.
        cuts: `[Q]` int64, ascending within a user; a sample sees its user's first `cuts[i]`
            behaviours of this batch, all strictly earlier than its request.
        candidates: feature name -> `[Q]`, int32 ids or float32.
        context: feature name -> `[Q]`, int32 ids or float32.
        counters: `[Q, K]` float32, log(1 + count before the request).
        labels: `[Q]` float32, 0 or 1.
        history_lengths: `[Q]` int64, behaviours before the request, also those a limit cut off.
        item_counts: `[Q]` int32, times the user had met this item before the request.
    """

    users: Int64
    history_offsets: Int64
    behaviours: dict[str, Array]
    sample_offsets: Int64
    cuts: Int64
    candidates: dict[str, Array]
    context: dict[str, Array]
    counters: Float32
    labels: Float32
    history_lengths: Int64
    item_counts: NDArray[np.int32]


@dataclass(frozen=True)
class _Shard:
    """Memory-mapped columns of one shard and where each user's rows lie."""

    history: dict[str, Array]
    samples: dict[str, Array]


@dataclass(frozen=True)
class _Users:
    """Users with samples in one split: their shard, and their rows in it as `[start, end)`."""

    index: Int64
    shard: Int64
    history_start: Int64
    sample_start: Int64
    sample_end: Int64

    def take(self, order: Int64) -> "_Users":
        return _Users(*(getattr(self, name)[order] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.index)


class Dataset:
    """A prepared data set.

    Args:
        folder: where it lies.
        manifest: its checked manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        names = {f.name for f in (*manifest.features.behaviour, *manifest.features.candidate)}
        catalogue = map_arrow(folder / "tables" / "catalogue.arrow")
        self._catalogue = {name: catalogue[name] for name in names if name in catalogue}

    @cached_property
    def encoders(self) -> dict[str, Encoder]:
        """What turned raw values into ids and numbers, by feature."""
        return encoders.load(self.folder / "tables" / "encoders.json")

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Self:
        """Open a prepared folder.

        Args:
            path: the folder.
            verify: also hash every file; sizes are always checked.

        Raises:
            DataError: if the folder is unfinished, of another format version, or altered.
        """
        folder = Path(path)
        manifest = Manifest.read(folder)
        manifest.check_files(folder)
        if verify:
            for name, info in manifest.files.items():
                if sha256(folder / name) != info.sha256:
                    raise DataError(
                        f"{folder / name} was altered; remove the folder and prepare again"
                    )
        return cls(folder, manifest)

    def n_batches(self, split: str, samples_per_batch: int = 4096, world_size: int = 1) -> int:
        """Return the number of batches of each rank; the same for every seed and rank.

        Raises:
            DataError: if the split is unknown or has fewer users than there are ranks.
        """
        info = self.manifest.splits.get(split)
        if info is None:
            raise DataError(f"no split {split!r}; known: {', '.join(self.manifest.splits)}")
        if samples_per_batch < 1 or world_size < 1:
            raise DataError(
                f"samples_per_batch and world_size must be positive, "
                f"got {samples_per_batch=}, {world_size=}"
            )
        if info.users < world_size:
            raise DataError(f"split {split!r} has {info.users} users for {world_size=} ranks")
        wanted = -(-info.samples // (samples_per_batch * world_size))
        return max(1, min(wanted, info.users // world_size))

    def batches(
        self,
        split: str,
        samples_per_batch: int = 4096,
        history_limit: int | None = None,
        shuffle_seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> Iterator[Batch]:
        """Yield this rank's batches; over all ranks every user comes exactly once.

        Args:
            split: a name in `manifest.splits`.
            samples_per_batch: samples of a batch on average; users are never torn apart.
            history_limit: behaviours before each sample that must be there; what is earlier than
                those of a user's first sample is left out of the batch. Later samples have more
                before them: a model that is to see so many and no more says so itself. None for
                all.
            shuffle_seed: order of the users, the same on all ranks; None for the stored order.
            rank: of this worker.
            world_size: number of workers.
            start: index of the first batch, to go on in the middle of an epoch.

        Raises:
            DataError: for arguments out of range.
        """
        count = self.n_batches(split, samples_per_batch, world_size)
        if not 0 <= rank < world_size:
            raise DataError(f"rank must be in [0, world_size), got {rank=}, {world_size=}")
        if history_limit is not None and history_limit < 1:
            raise DataError(f"history_limit must be positive or None, got {history_limit=}")
        if start < 0:
            raise DataError(f"start must not be negative, got {start=}")
        return self._iterate(split, count, history_limit, shuffle_seed, rank, world_size, start)

    def _iterate(
        self,
        split: str,
        count: int,
        history_limit: int | None,
        shuffle_seed: int | None,
        rank: int,
        world_size: int,
        start: int,
    ) -> Iterator[Batch]:
        shards, users = self._open_split(split)
        if shuffle_seed is not None:
            users = users.take(np.random.default_rng(shuffle_seed).permutation(len(users)))
        edges = _group_edges(users.sample_end - users.sample_start, count * world_size)
        for group in range(start * world_size + rank, count * world_size, world_size):
            chosen = users.take(np.arange(edges[group], edges[group + 1]))
            yield self._batch(shards, chosen, history_limit)

    def _open_split(self, split: str) -> tuple[list[_Shard], _Users]:
        shards, users = [], []
        for number in range(self.manifest.shards):
            file = f"{number:05d}.arrow"
            shards.append(
                _Shard(
                    map_arrow(self.folder / "histories" / file),
                    map_arrow(self.folder / "samples" / split / file),
                )
            )
            users.append(_users_of(map_arrow(self.folder / "users" / file), split, number))
        parts = _Users.__dataclass_fields__
        return shards, _Users(
            *(np.concatenate([getattr(part, name) for part in users]) for name in parts)
        )

    def _batch(self, shards: list[_Shard], users: _Users, limit: int | None) -> Batch:
        samples = [shard.samples for shard in shards]
        history = [shard.history for shard in shards]
        spans = _Spans(users.shard, users.sample_start, users.sample_end)
        ends = spans.gather(samples, HISTORY_END).astype(np.int64)
        first, last = ends[spans.offsets[:-1]], ends[spans.offsets[1:] - 1]
        trimmed = np.zeros_like(first) if limit is None else np.maximum(first - limit, 0)
        begin = users.history_start
        seen = _Spans(users.shard, begin + trimmed, begin + last)
        rows, asked = seen.gather(history, ROW), spans.gather(samples, ROW)
        features = self.manifest.features
        counters = [counter_column(self.manifest.schema, name) for name in features.counters]
        counts = [spans.gather(samples, name) for name in counters]
        return Batch(
            users=users.index,
            history_offsets=seen.offsets,
            behaviours={
                f.name: self._catalogue[f.name][rows]
                if f.name in self._catalogue
                else seen.gather(history, f.name)
                for f in features.behaviour
            },
            sample_offsets=spans.offsets,
            cuts=ends - np.repeat(trimmed, spans.lengths),
            candidates={f.name: self._catalogue[f.name][asked] for f in features.candidate},
            context={
                f.name: spans.gather(samples, f.name).astype(_DTYPES[f.kind], copy=False)
                for f in features.context
            },
            counters=_log_counts(counts, len(ends)),
            labels=spans.gather(samples, LABEL).astype(np.float32),
            history_lengths=ends,
            item_counts=spans.gather(samples, ITEM_COUNT),
        )


class _Spans:
    """Ranges of rows, one a user, each in its own shard."""

    def __init__(self, shard: Int64, start: Int64, end: Int64) -> None:
        self.lengths = end - start
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self._spans = list(zip(shard.tolist(), start.tolist(), end.tolist(), strict=True))

    def gather(self, shards: list[dict[str, Array]], column: str) -> Array:
        """Concatenate the ranges of one column: one copy of each history, none of a sample's."""
        return np.concatenate([shards[s][column][start:end] for s, start, end in self._spans])


def _users_of(columns: dict[str, Array], split: str, shard: int) -> _Users:
    ends, history_ends = columns[f"{split}_end"], columns["history_end"]
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    history_starts = np.concatenate([[0], history_ends[:-1]]).astype(np.int64)
    some = np.flatnonzero(ends > starts)
    shards = np.full(len(some), shard, np.int64)
    return _Users(columns[INDEX][some], shards, history_starts[some], starts[some], ends[some])


def _group_edges(samples: Int64, groups: int) -> Int64:
    """Cut users into groups of nearly equal samples, none of them empty."""
    total = np.concatenate([[0], np.cumsum(samples)])
    number = np.arange(groups + 1)
    edges = np.searchsorted(total, number * (total[-1] / groups))
    # A user with many samples may fill several groups; each must still hold one user.
    edges = np.maximum.accumulate(edges - number) + number
    capped: Int64 = np.minimum(edges, len(samples) - groups + number)
    return capped


def _log_counts(counts: list[Array], samples: int) -> Float32:
    if not counts:
        return np.empty((samples, 0), np.float32)
    return np.log1p(np.stack(counts, axis=1).astype(np.float32))
