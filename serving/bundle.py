"""A loaded bundle: user records from behaviours, and scores from records; without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hashtab.features import encoders
from hashtab.features.catalogue import Catalogue
from hashtab.features.encoders import Encoder
from hashtab.features.manifest import Feature
from hashtab.features.storage import Array
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.golden import GoldenBatch
from hashtab.serving.manifest import (
    CATALOGUE,
    ENCODER,
    ENCODERS,
    GOLDEN,
    ITEMS,
    ONLINE,
    SCORER,
    BundleManifest,
)
from hashtab.serving.online import FEWEST, OnlineScorer
from hashtab.serving.session import open_session
from hashtab.serving.store import COMPONENT_LIMIT, TableOverflowError, UserRecord, add

_TOLERANCE = 1e-4  # of a score, between two machines' arithmetic
_PIECE = 4096  # behaviours of one call
_INT32 = np.iinfo(np.int32)

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Items to score for one user. C candidates.

    Args:
        features: candidate feature -> `[C]`, int32 ids or float32.
        context: context feature -> `[C]`, int32 ids or float32.
        counters: `[C, K]` float32, log(1 + count).
    """

    features: dict[str, Array]
    context: dict[str, Array]
    counters: Float32


class Bundle:
    """One exported model, ready to serve; open it once in each process, for all of its threads.

    Args:
        folder: of the bundle.
        manifest: checked.
        threads: that the scorer may use in one call; more than one may change a score's last digit.
    """

    graph = SCORER

    def __init__(self, folder: Path, manifest: BundleManifest, threads: int = 1) -> None:
        self.folder = folder
        self.manifest = manifest
        self.layout = manifest.layout
        self._threads = threads
        self._scorer = open_session(folder / SCORER, threads)
        self._online = OnlineScorer(folder, threads)
        # onnxruntime's threads add to one row of a table without a lock, and lose behaviours.
        self._encoder = open_session(folder / ENCODER, 1) if manifest.table.groups else None

    @classmethod
    def open(cls, path: str | Path, *, threads: int = 1) -> Self:
        """Open a bundle: check each file's digest, load it and replay its golden batch.

        Raises:
            BundleError: naming the file that is missing, altered, of another bundle or unusable
                here.
        """
        folder = Path(path)
        manifest = BundleManifest.read(folder)
        manifest.check_files(folder)
        bundle = cls(folder, manifest, threads)
        bundle.replay(GoldenBatch.read(folder / GOLDEN))
        return bundle

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items that were known when the model was trained."""
        return Catalogue.read(self.folder / CATALOGUE, self.manifest.item)

    @cached_property
    def encoders(self) -> dict[str, Encoder]:
        """What turns raw values into ids and numbers, by feature."""
        return encoders.load(self.folder / ENCODERS)

    def increments(self, behaviours: Mapping[str, Array]) -> NDArray[np.int64]:
        """Return what behaviours add to their user's table.

        Args:
            behaviours: feature -> `[L]`, of one user, in any order.

        Returns:
            `[G, buckets, D]` int64 in units of 2^-16, the same for any cut into pieces.

        Raises:
            TableOverflowError: if a component of a behaviour's vector reaches 256 or is no number.
        """
        length = len(next(iter(behaviours.values())))
        shape = self.layout.shape
        total = np.zeros(shape, np.int64)
        for start in range(0, length if self._encoder else 0, _PIECE):
            total += self._increments(
                {name: column[start : start + _PIECE] for name, column in behaviours.items()}
            )
        return total

    def _increments(self, behaviours: Mapping[str, Array]) -> NDArray[np.int64]:
        increments, _, vectors = self.encode(behaviours)
        length = len(vectors)
        largest = int(np.abs(vectors).max(initial=0))
        if largest >= COMPONENT_LIMIT - 1:  # where the encoder puts all that is larger
            raise TableOverflowError(
                "a behaviour's vector has a component of 256 or more, or that is no number, which "
                "no table holds: look for an outlier in the numeric features of behaviours"
            )
        if largest * length <= _INT32.max:
            return increments.astype(np.int64)
        # The sums of one call are int32 and might have wrapped; half as many cannot for long.
        halves = (slice(None, length // 2), slice(length // 2, None))
        first, second = ({name: c[half] for name, c in behaviours.items()} for half in halves)
        return self._increments(first) + self._increments(second)

    def encode(self, behaviours: Mapping[str, Array]) -> tuple[Int32, Int32, Int32]:
        """Run the encoder on behaviours `[L]` of one user as it is.

        Returns:
            Increments `[G, buckets, D]`, codes `[L, G]` and vectors `[L, D]`, all int32; increments
            may have wrapped where `increments` would not.

        Raises:
            BundleError: if the model keeps no table.
        """
        increments, codes, vectors = self.run_encoder(self.encoder_inputs(behaviours))
        return increments[0], codes[0], vectors[0]

    def encoder_inputs(self, behaviours: Mapping[str, Array]) -> dict[str, Array]:
        """Return behaviours `[L]` of one user as the encoder's inputs by name, `[1, L]`."""
        return {
            f"behaviour.{f.name}": _column(behaviours[f.name], f)[None]
            for f in self.manifest.features.behaviour
        }

    def run_encoder(self, inputs: dict[str, Array]) -> tuple[Int32, Int32, Int32]:
        """Run the encoder's graph on inputs by name.

        Raises:
            BundleError: if the model keeps no table.
        """
        if self._encoder is None:
            raise BundleError(f"{self.folder}: encoder {self.manifest.encoder!r} keeps no table")
        increments, codes, vectors = self._encoder.run(None, inputs)
        return increments, codes, vectors

    def run_scorer(self, inputs: dict[str, Array]) -> Float32:
        """Run the scorer's graph on inputs by name, to `[U, C]`."""
        scores: Float32 = self._scorer.run(None, inputs)[0]
        return scores

    def record(
        self,
        behaviours: Mapping[str, Array],
        times: NDArray[np.int64],
        rows: Array,
        watermark: int = 0,
    ) -> UserRecord:
        """Return the record of a user from all behaviours before a moment.

        Args:
            behaviours: feature -> `[L]`, in time order.
            times: `[L]` int64, microseconds since 1970 UTC.
            rows: `[L]`, catalogue row of each behaviour's item, -1 where it is unknown.
            watermark: the moment, microseconds since 1970 UTC.

        Raises:
            TableOverflowError: if the table leaves int32.
        """
        limit = self.manifest.history_limit or len(times)
        kept = slice(max(len(times) - limit, 0), None)
        recent = slice(max(len(times) - self.layout.recent, 0), None)
        empty = UserRecord.empty(self.layout, watermark=watermark)
        increments = self.increments({name: c[kept] for name, c in behaviours.items()})
        return UserRecord(
            revision=1,
            watermark=watermark,
            behaviours=len(times[kept]),
            table=add(empty.table, increments),
            recent_times=times[recent],
            recent={
                name: behaviours[name][recent].astype(dtype) for name, dtype in self.layout.features
            },
            counters={name: self._counts(name, rows) for name in self.layout.counters},
            events=empty.events,
        )

    def _counts(self, name: str, rows: Array) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        values = self.counted(name)[rows]
        keys, counts = np.unique(values[values > 0], return_counts=True)
        return keys.astype(np.uint32), counts.astype(np.uint32)

    def counted(self, name: str) -> NDArray[np.int64]:
        """What a counter of the model counts, by catalogue row; 0 is never counted."""
        return self._counted[name]

    @cached_property
    def _counted(self) -> dict[str, NDArray[np.int64]]:
        return {name: self.catalogue.counted(name) for name in self.manifest.features.counters}

    def counters(self, record: UserRecord, rows: Array) -> Float32:
        """Return log(1 + times the user met each candidate's value), `[C, K]`.

        Args:
            record: of the user.
            rows: `[C]`, catalogue row of each candidate, -1 where it is unknown.
        """
        counts = np.zeros((len(rows), len(self.layout.counters)), np.float32)
        for k, name in enumerate(self.layout.counters):
            keys, met = record.counters[name]
            wanted = self._counted[name][rows]
            if len(keys):
                place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
                counts[:, k] = np.where(keys[place] == wanted, met[place], 0)
        return np.log1p(counts)

    def score(self, record: UserRecord, candidates: Candidates) -> Float32:
        """Return the probability of each of a user's candidates, `[C]` float32.

        The score of a candidate does not depend on the others, not in a bit where `threads` is 1.

        Raises:
            RequestError: if the candidates lack a feature that the model reads.
        """
        return self.score_users([record], [candidates])[0]

    def score_users(
        self, records: Sequence[UserRecord], candidates: Sequence[Candidates]
    ) -> list[Float32]:
        """Score the candidates of several users in one call, which suits short lists.

        Args:
            records: of the users.
            candidates: of each user, at least one.

        Returns:
            For each user `[C]` float32.

        Raises:
            RequestError: if candidates lack a feature that the model reads.
        """
        scores = self.run_scorer(self.scorer_inputs(records, candidates))
        return [row[: len(part.counters)] for row, part in zip(scores, candidates, strict=True)]

    def item_parts(self, features: Mapping[str, Array]) -> dict[str, Array]:
        """Return what `score_items` reads of items, whoever the user is.

        Args:
            features: candidate feature -> `[N]`, int32 ids or float32.

        Returns:
            By name, `[N, ...]`.

        Raises:
            RequestError: if a feature that the model reads is missing.
        """
        wanted = self.manifest.features.candidate
        return self._online.items(
            {f"candidate.{f.name}": _column(_wanted(features, f), f) for f in wanted}
        )

    def score_items(
        self,
        record: UserRecord,
        items: Mapping[str, Array],
        context: Mapping[str, Array],
        counters: Float32,
    ) -> Float32:
        """Return what `score` does, to the bit where `threads` is 1, in less time.

        Args:
            record: of the user.
            items: by name, `[C, ...]`, taken from `item_parts`.
            context: context feature -> `[C]`, int32 ids or float32.
            counters: `[C, K]` float32, log(1 + count).

        Raises:
            RequestError: if a context feature that the model reads is missing.
        """
        count, columns = len(counters), dict(items)
        for f in self.manifest.features.context:
            columns[f"context.{f.name}"] = _column(_wanted(context, f), f)
        if self.manifest.features.counters:
            columns["counters"] = counters
        if count < FEWEST:
            columns = {n: np.resize(c, (FEWEST, *c.shape[1:])) for n, c in columns.items()}
        feed = self._state([record]) | {name: column[None] for name, column in columns.items()}
        return self._online.scores(feed)[0, :count]

    def scorer_inputs(
        self, records: Sequence[UserRecord], candidates: Sequence[Candidates]
    ) -> dict[str, Array]:
        """Return the scorer's inputs by name; shorter lists of candidates are padded."""
        width = max(FEWEST, *(len(part.counters) for part in candidates))
        return self._state(records) | self._candidates(candidates, width)

    def _candidates(self, parts: Sequence[Candidates], width: int) -> dict[str, Array]:
        features = self.manifest.features
        feed = {
            f"candidate.{f.name}": _padded([_wanted(part.features, f) for part in parts], width, f)
            for f in features.candidate
        }
        for f in features.context:
            feed[f"context.{f.name}"] = _padded(
                [_wanted(part.context, f) for part in parts], width, f
            )
        if features.counters:
            counters = np.zeros((len(parts), width, len(features.counters)), np.float32)
            for i, part in enumerate(parts):
                counters[i, : len(part.counters)] = part.counters
            feed["counters"] = counters
        return feed

    def _state(self, records: Sequence[UserRecord]) -> dict[str, Array]:
        feed: dict[str, Array] = {}
        if self.layout.groups:
            tables = [record.table for record in records]
            feed["table"] = tables[0][None] if len(tables) == 1 else np.stack(tables)
        if self.manifest.counts_behaviours:
            feed["behaviours"] = np.array([record.behaviours for record in records], np.int64)
        if self.layout.recent:
            lengths = [len(record.recent_times) for record in records]
            width = max(1, *lengths)
            for f in self.manifest.features.behaviour:
                columns = [record.recent[f.name] for record in records]
                feed[f"recent.{f.name}"] = _padded(columns, width, f)
            feed["recent_lengths"] = np.array(lengths, np.int64)
        return feed

    def example(self) -> dict[str, Array]:
        """Return the scorer's inputs by name, of the first user of the golden batch."""
        golden = GoldenBatch.read(self.folder / GOLDEN)
        return {name: column[:1] for name, column in golden.scorer_inputs.items()}

    def replay(self, golden: GoldenBatch) -> None:
        """Compute the golden batch again.

        Raises:
            BundleError: if this machine's answers are not those of the export.
        """
        scores = self.run_scorer(golden.scorer_inputs)
        difference = float(np.abs(scores - golden.scores).max())
        if not difference <= _TOLERANCE:
            raise BundleError(
                f"{self.folder / SCORER} scores its golden batch {difference:.2g} apart from its "
                f"export, more than {_TOLERANCE:g}; this onnxruntime cannot serve it"
            )
        self.check_halves(golden.scorer_inputs, scores)
        if golden.encoder_inputs:
            increments, codes, _ = self.run_encoder(golden.encoder_inputs)
            if not (
                np.array_equal(codes, golden.codes)
                and np.array_equal(increments, golden.increments)
            ):
                raise BundleError(
                    f"{self.folder / ENCODER} hashes its golden batch to other buckets than its "
                    "export did; this onnxruntime cannot serve it"
                )

    def check_halves(self, inputs: Mapping[str, Array], scores: Float32) -> None:
        """Hold the scorer's two halves against the scores `[U, C]` of the whole.

        Raises:
            BundleError: if they differ in a bit.
        """
        if self._threads > 1:  # no two calls need agree to the bit
            return
        differ = int(np.count_nonzero(self._online.whole(inputs) != scores))
        if differ:
            raise BundleError(
                f"{self.folder}: {ITEMS} and {ONLINE} differ from {SCORER} in {differ} of "
                f"{scores.size} scores of the golden batch; this onnxruntime cannot serve it"
            )


def _column(column: Array, feature: Feature) -> Array:
    return column.astype(np.int32 if feature.kind == "categorical" else np.float32, copy=False)


def _wanted(columns: Mapping[str, Array], feature: Feature) -> Array:
    if feature.name not in columns:
        raise RequestError(
            f"the candidates have no {feature.name!r}, which the model reads; they have "
            f"{sorted(columns)}"
        )
    return columns[feature.name]


def _padded(columns: Sequence[Array], width: int, feature: Feature) -> Array:
    """Columns of several users as rows, padded with zeros at the end."""
    dtype = np.int32 if feature.kind == "categorical" else np.float32
    if len(columns) == 1 and len(columns[0]) == width:
        return columns[0].astype(dtype, copy=False)[None]
    padded = np.zeros((len(columns), width), dtype)
    for row, column in zip(padded, columns, strict=True):
        row[: len(column)] = column
    return padded
