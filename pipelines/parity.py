"""The parity gate: a trained model in torch against its bundle in onnxruntime, case by case."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from hashtab.features.catalogue import UNKNOWN_ROW
from hashtab.features.dataset import Batch, Dataset
from hashtab.features.histories import HistoryReader
from hashtab.features.manifest import Feature
from hashtab.features.storage import Array
from hashtab.kernels import sdim
from hashtab.models.ctr import ClickModel, TensorBatch
from hashtab.serving.bundle import Bundle, Candidates, Float32
from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import Parity
from hashtab.serving.store import TableOverflowError, UserRecord, pack, sum_by_bucket, unpack

TOLERANCE = 1e-4
REAL_REQUESTS = 128
TABLES = 32  # the definition of a table is slow; the hard cases come last
MANY_CANDIDATES = 2000
_CODES_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request: what a user did before it, and what is to be scored.

    Args:
        name: of the kind of case.
        behaviours: feature -> `[L]`, in time order.
        candidates: to score.
    """

    name: str
    behaviours: dict[str, Array]
    candidates: Candidates

    @property
    def length(self) -> int:
        """Number of behaviours."""
        return len(next(iter(self.behaviours.values())))


def check_parity(model: ClickModel, bundle: Bundle, cases: list[Case]) -> Parity:
    """Hold every score and hash code of the bundle against those of the model.

    Codes are compared over all items of the catalogue and over all cases, tables against the sum
    that defines them, and the scorer's two halves with the whole.

    Raises:
        BundleError: if two scores differ by more than 1e-4, or those of the halves, a code or a
            table at all, or if a history leaves the fixed point of tables.
    """
    largest, codes = 0.0, check_catalogue_codes(model, bundle)
    for case in cases:
        try:
            record = record_of(bundle, case.behaviours)
        except TableOverflowError as error:
            raise BundleError(f"{error} ({case.name}): nothing was exported") from error
        served = bundle.score(record, case.candidates)
        difference = float(np.abs(served - torch_scores(model, case)).max())
        if not difference <= TOLERANCE:
            raise BundleError(
                f"onnxruntime and torch differ by {difference:.2g} in the score of a request "
                f"({case.name}, {len(next(iter(case.behaviours.values())))} behaviours), more than "
                f"{TOLERANCE:g}: nothing was exported"
            )
        check_halves(bundle, record, case, served)
        largest = max(largest, difference)
        codes += check_codes(model, bundle, case.behaviours, case.name)
    for case in cases[-TABLES:]:
        check_table(bundle, case.behaviours, case.name)
    scores = sum(len(case.candidates.counters) for case in cases)
    return Parity(requests=len(cases), scores=scores, largest_difference=largest, codes=codes)


def check_halves(bundle: Bundle, record: UserRecord, case: Case, scores: Float32) -> None:
    """Hold what an online service answers against the scores that batch scoring gives."""
    candidates = case.candidates
    items = bundle.item_parts(candidates.features)
    online = bundle.score_items(record, items, candidates.context, candidates.counters)
    if online.tobytes() != scores.tobytes():
        raise BundleError(
            f"the scorer's two halves differ from the whole by "
            f"{np.abs(online - scores).max():.2g} in a score, where no bit may differ "
            f"({case.name}): nothing was exported"
        )


def record_of(bundle: Bundle, behaviours: Mapping[str, Array]) -> UserRecord:
    """Return a user's record as it comes out of a store; without counters, which cases bring."""
    length = len(next(iter(behaviours.values())))
    rows = np.full(length, UNKNOWN_ROW)
    record = bundle.record(behaviours, np.arange(length), rows)
    return unpack(pack(record, bundle.layout), bundle.layout)


@torch.inference_mode()
def torch_scores(model: ClickModel, case: Case) -> NDArray[np.float64]:
    """Return the model's probabilities `[C]`."""
    length = len(next(iter(case.behaviours.values())))
    count = len(case.candidates.counters)
    batch = TensorBatch(
        history_offsets=torch.tensor([0, length]),
        behaviours=_tensors(case.behaviours),
        sample_offsets=torch.tensor([0, count]),
        cuts=torch.full((count,), length),
        candidates=_tensors(case.candidates.features),
        context=_tensors(case.candidates.context),
        counters=torch.from_numpy(case.candidates.counters),
        labels=torch.zeros(count),
    )
    scores: NDArray[np.float64] = model(batch).double().sigmoid().numpy()
    return scores


def _tensors(columns: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}


def check_catalogue_codes(model: ClickModel, bundle: Bundle) -> int:
    """Compare the codes of every item; returns how many codes were compared."""
    rows = np.arange(UNKNOWN_ROW, len(bundle.catalogue))
    compared = 0
    for start in range(0, len(rows), _CODES_AT_ONCE):
        some = rows[start : start + _CODES_AT_ONCE]
        behaviours = bundle.catalogue.columns(some, bundle.manifest.items)
        behaviours |= {
            f.name: np.full(len(some), f.kind == "categorical", _dtype(f))
            for f in bundle.manifest.features.behaviour
            if f.name in bundle.manifest.side
        }
        compared += check_codes(model, bundle, behaviours, "the items of the catalogue")
    return compared


@torch.inference_mode()
def check_codes(
    model: ClickModel, bundle: Bundle, behaviours: Mapping[str, Array], name: str
) -> int:
    """Compare hash codes of behaviours; returns how many codes were compared."""
    length = len(next(iter(behaviours.values())))
    if not bundle.layout.groups or not length:
        return 0
    _, codes, _ = bundle.encode(behaviours)
    embedded = model.objects(_tensors(behaviours), model.features.behaviour)
    expected = _kernel_codes(model, embedded)
    if not np.array_equal(codes, expected):
        differ = int((codes != expected).any(axis=1).sum())
        raise BundleError(
            f"onnxruntime and torch hash {differ} of {length} behaviours to other buckets "
            f"({name}): nothing was exported. They lie on a hash plane but for rounding, which the "
            "two round differently on this machine: train with another --seed, or export elsewhere"
        )
    return int(codes.size)


def check_table(bundle: Bundle, behaviours: Mapping[str, Array], name: str) -> None:
    """Hold a table against the sum that defines it, bit for bit."""
    if bundle.layout.groups:
        _, codes, vectors = bundle.encode(behaviours)
        table = sum_by_bucket(codes, vectors, bundle.layout.buckets)
        if not np.array_equal(bundle.increments(behaviours), table):
            raise BundleError(
                f"a table is not the sum of its behaviours ({name}): nothing was exported"
            )


def _kernel_codes(model: ClickModel, embedded: torch.Tensor) -> Array:
    """Hash with the kernel that training hashes with."""
    settings = model.settings
    planes = [v for k, v in model.state_dict().items() if k.rpartition(".")[2] == "planes"]
    if not planes:
        return np.zeros((len(embedded), 1), np.int32)
    codes: Array = sdim.codes(embedded, planes[0], settings.tau).numpy()
    return codes


def _dtype(feature: Feature) -> type[np.generic]:
    return np.int32 if feature.kind == "categorical" else np.float32


def cases(dataset: Dataset, model: ClickModel) -> list[Case]:
    """Return requests of the validation split, and those that go wrong first.

    Hard ones: an empty history, one candidate, 2,000 candidates, items that no one knows, and the
    longest history of all users.
    """
    # The longest histories first: these are what a golden batch replays.
    real = sorted(real_cases(dataset, REAL_REQUESTS), key=lambda case: -case.length)
    if not model.settings.counters:
        real = [_without_counters(case) for case in real]
    usual = max(real, key=lambda case: len(case.candidates.counters))
    none = {name: column[:0] for name, column in usual.behaviours.items()}
    unknown = {f.name: f.kind == "categorical" for f in dataset.manifest.features.candidate}
    many = np.arange(MANY_CANDIDATES) % len(usual.candidates.counters)
    strangers = Candidates(
        features={n: np.full_like(c, unknown[n]) for n, c in usual.candidates.features.items()},
        context=usual.candidates.context,
        counters=np.zeros_like(usual.candidates.counters),
    )
    new_items = {
        name: np.full_like(column, unknown.get(name, 1))
        for name, column in usual.behaviours.items()
    }
    return [
        *real,
        Case(name="empty history", behaviours=none, candidates=usual.candidates),
        Case(
            name="one candidate",
            behaviours=usual.behaviours,
            candidates=_take(usual.candidates, np.arange(1)),
        ),
        Case(
            name="2,000 candidates",
            behaviours=usual.behaviours,
            candidates=_take(usual.candidates, many),
        ),
        Case(name="unknown candidates", behaviours=usual.behaviours, candidates=strangers),
        Case(name="unknown behaviours", behaviours=new_items, candidates=usual.candidates),
        Case(
            name="longest history",
            behaviours=longest_history(dataset),
            candidates=usual.candidates,
        ),
    ]


def real_cases(dataset: Dataset, count: int) -> Iterator[Case]:
    """Yield about `count` requests of the validation split, spread evenly over its users."""
    requests = dataset.manifest.splits["validation"].requests
    step, number = max(1, requests // count), 0
    for batch in dataset.batches("validation"):
        for user in range(len(batch.users)):
            for samples in requests_of(batch, user):
                if number % step == 0:
                    yield _case(batch, user, samples)
                number += 1


def requests_of(batch: Batch, user: int) -> list[slice]:
    """Return the runs of a user's samples with one cut: its requests, as far as history tells."""
    begin, end = batch.sample_offsets[user : user + 2].tolist()
    changes = np.flatnonzero(np.diff(batch.cuts[begin:end])) + 1 + begin
    edges = [begin, *changes.tolist(), end]
    return [slice(first, last) for first, last in pairwise(edges)]


def _case(batch: Batch, user: int, samples: slice) -> Case:
    start = int(batch.history_offsets[user])
    seen = slice(start, start + int(batch.cuts[samples.start]))
    return Case(
        name="validation request",
        behaviours={name: column[seen] for name, column in batch.behaviours.items()},
        candidates=Candidates(
            features={name: column[samples] for name, column in batch.candidates.items()},
            context={name: column[samples] for name, column in batch.context.items()},
            counters=batch.counters[samples],
        ),
    )


def _without_counters(case: Case) -> Case:
    candidates = case.candidates
    counters = np.zeros((len(candidates.counters), 0), np.float32)
    return Case(
        name=case.name,
        behaviours=case.behaviours,
        candidates=Candidates(
            features=candidates.features, context=candidates.context, counters=counters
        ),
    )


def _take(candidates: Candidates, order: Array) -> Candidates:
    return Candidates(
        features={name: column[order] for name, column in candidates.features.items()},
        context={name: column[order] for name, column in candidates.context.items()},
        counters=candidates.counters[order],
    )


def longest_history(dataset: Dataset) -> dict[str, Array]:
    """Return all behaviours of the user with most of them: feature -> `[L]`."""
    reader = HistoryReader(dataset.folder)
    shards = map(reader.shard, range(dataset.manifest.shards))
    histories = max(shards, key=lambda found: int((found.ends - found.starts).max(initial=0)))
    kept = histories.of(int((histories.ends - histories.starts).argmax()))
    behaviours = {name: column[kept] for name, column in histories.side.items()}
    names = [f.name for f in dataset.manifest.features.behaviour if f.name not in behaviours]
    return behaviours | reader.catalogue.columns(histories.rows[kept], names)
