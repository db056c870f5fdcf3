"""Scores of a split's samples through a bundle, each as its user stood at the time of its request.

The split may come from another data set than the bundle's: raw values meet in the bundle's ids.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hashtab.features.catalogue import Catalogue
from hashtab.features.dataset import Batch, Dataset
from hashtab.features.encoders import translation
from hashtab.features.errors import DataError
from hashtab.features.manifest import Feature
from hashtab.features.storage import Array
from hashtab.pipelines.evaluation import Predictions
from hashtab.pipelines.parity import requests_of
from hashtab.serving.bundle import Bundle, Candidates
from hashtab.serving.store import UserRecord, add

_SAMPLES_PER_BATCH = 4096
_REQUESTS_AT_ONCE = 64  # of one call; as many tables are in memory

_Turns = dict[str, Callable[[Array], Array]]


def score_split(
    bundle: Bundle, dataset: Dataset, split: str, title: str = "scoring"
) -> Predictions:
    """Score every sample of a split with onnxruntime, in the order of `dataset.batches(split)`.

    Args:
        bundle: that scores.
        dataset: prepared data, that the bundle's model was trained on or another.
        split: name of the split.
        title: of the progress bar.

    Raises:
        DataError: if the data has no such split, or lacks what the bundle reads.
        TableOverflowError: if a user's table leaves int32.
    """
    parts = []
    batches = TranslatedDataset(dataset, bundle).translated(split)
    with tqdm(desc=title, unit=" samples", disable=None) as bar:
        for batch in batches:
            bar.total = dataset.manifest.splits[split].samples
            users = range(len(batch.users))
            scores = [part for user in users for part in _scores(bundle, batch, user)]
            parts.append(Predictions.of(batch, np.concatenate(scores).astype(np.float64)))
            bar.update(len(batch.labels))
    return Predictions.join(parts)


class TranslatedDataset(Dataset):
    """A prepared data set in the ids of a bundle, with the features and counters that it reads.

    Items that the bundle does not know, and values that its encoders do not know, are unknown.

    Args:
        dataset: to translate.
        bundle: whose ids are wanted.

    Raises:
        DataError: if the data lacks a feature or counter that the bundle reads.
    """

    def __init__(self, dataset: Dataset, bundle: Bundle) -> None:
        manifest, schema = bundle.manifest, dataset.manifest.schema
        self._check_counted(dataset, manifest.item, manifest.features.counters)
        super().__init__(dataset.folder, replace(dataset.manifest, features=manifest.features))
        own = Catalogue.read(dataset.folder / "tables" / "catalogue.arrow", schema.item_name)
        rows = bundle.catalogue.rows(own.items)
        self._catalogue = bundle.catalogue.columns(rows, manifest.items)
        self._limit = _behaviours_needed(bundle)
        side = [f for f in manifest.features.behaviour if f.name in manifest.side]
        self._side = _translations(dataset, bundle, side, schema.side)
        context = [f.name for f in dataset.manifest.features.context]
        self._context = _translations(dataset, bundle, manifest.features.context, context)

    @staticmethod
    def _check_counted(dataset: Dataset, item: str, wanted: Iterable[str]) -> None:
        schema = dataset.manifest.schema
        counted = (schema.item_name, *schema.counters)
        missing = [name for name in (item, *wanted) if name not in counted]
        if missing:
            raise DataError(
                f"{dataset.folder} has no counter {missing[0]!r}, which the model reads; it counts "
                f"{list(counted)}"
            )

    def translated(self, split: str) -> Iterator[Batch]:
        """Yield the batches of a split, with as much of each history as the bundle needs."""
        for batch in self.batches(split, _SAMPLES_PER_BATCH, self._limit):
            yield replace(
                batch,
                behaviours=_turned(batch.behaviours, self._side),
                context=_turned(batch.context, self._context),
            )


def _behaviours_needed(bundle: Bundle) -> int | None:
    if bundle.layout.groups:
        return bundle.manifest.history_limit
    return max(bundle.layout.recent, 1)


def _translations(
    dataset: Dataset, bundle: Bundle, features: Iterable[Feature], stored: Sequence[str]
) -> _Turns:
    """What turns each feature as stored into the bundle's ids or numbers."""
    turns = {}
    for feature in features:
        before, after = (x.encoders.get(feature.name) for x in (dataset, bundle))
        if feature.name not in stored or type(before) is not type(after):
            raise DataError(
                f"{dataset.folder} has no {feature.kind} feature {feature.name!r} of behaviours or "
                f"requests, which the model reads; it has {list(stored)}"
            )
        if before is not None and after is not None:  # those of time have the same ids everywhere
            turns[feature.name] = translation(before, after)
    return turns


def _turned(columns: dict[str, Array], turns: _Turns) -> dict[str, Array]:
    return columns | {name: turn(columns[name]) for name, turn in turns.items()}


def _scores(bundle: Bundle, batch: Batch, user: int) -> Iterator[NDArray[np.float32]]:
    """Yield the scores of a user's samples, request by request."""
    requests = requests_of(batch, user)
    records = _records(bundle, batch, user, requests)
    for start in range(0, len(requests), _REQUESTS_AT_ONCE):
        some = requests[start : start + _REQUESTS_AT_ONCE]
        asked = [_candidates(batch, samples) for samples in some]
        yield from bundle.score_users([next(records) for _ in some], asked)


def _candidates(batch: Batch, samples: slice) -> Candidates:
    return Candidates(
        features={name: column[samples] for name, column in batch.candidates.items()},
        context={name: column[samples] for name, column in batch.context.items()},
        counters=batch.counters[samples],
    )


def _records(
    bundle: Bundle, batch: Batch, user: int, requests: Sequence[slice]
) -> Iterator[UserRecord]:
    """Yield a user's record at each request.

    Sums of behaviours are exact, so that a table follows from the last one: what has happened since
    comes in, what is beyond the limit goes out.
    """
    first = int(batch.history_offsets[user])
    limit = bundle.manifest.history_limit
    empty = UserRecord.empty(bundle.layout)
    total, begin, end = empty.table.astype(np.int64), first, first
    for samples in requests:
        cut = first + int(batch.cuts[samples.start])
        start = first if limit is None else max(cut - limit, first)
        if start >= end:  # nothing of the last table is left
            total, begin, end = np.zeros_like(total), start, start
        total = total + _sum(bundle, batch, end, cut) - _sum(bundle, batch, begin, start)
        begin, end = start, cut
        recent = slice(max(cut - bundle.layout.recent, first), cut)
        yield replace(
            empty,
            behaviours=cut - start,
            table=add(empty.table, total),
            recent_times=np.zeros(recent.stop - recent.start, np.int64),
            recent={name: batch.behaviours[name][recent] for name, _ in bundle.layout.features},
        )


def _sum(bundle: Bundle, batch: Batch, start: int, stop: int) -> NDArray[np.int64]:
    return bundle.increments({n: column[start:stop] for n, column in batch.behaviours.items()})
