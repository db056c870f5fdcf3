"""Retrieval: which user vector finds what households buy next, and what a search costs.

`python experiments/bench_retrieval.py --bundle runs/<name>/bundle` needs the data of `make demo`.
The first part ranks user vectors by the share of a household's next purchases among 500 items, on
the validation weeks, on which ridge and shrinkage of `serving/retrieval/space.py` were chosen; the
test weeks were looked at once, after that. The second part says what a search of 500 items costs
one thread, and its recall, beside exact search and HNSW: of the demo's items and households, and of
100,000 made-up items around 1,000 tastes whose users like five of these each.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import faiss
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.features.dataset import Dataset
from hashtab.pipelines.build_index import read
from hashtab.pipelines.encoding import moment, open_histories, record_of_user
from hashtab.serving.bundle import Bundle
from hashtab.serving.retrieval import (
    RetrievalIndex,
    Sample,
    Space,
    build_index,
    building,
    item_vectors,
    space,
)

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

AT, ASKED = 500, 300
ITEMS, TASTES, SIZE = 100_000, 1_000, 32


@dataclass(frozen=True, kw_only=True)
class Households:
    """Households that buy in a split, as of its begin.

    Args:
        tables: `[U, G, buckets, D]`.
        behaviours: `[U]`, in the table.
        past: catalogue rows that each had bought, the most bought first.
        following: catalogue rows that each buys in the split.
    """

    tables: Array
    behaviours: Array
    past: list[Rows]
    following: list[Rows]

    @property
    def means(self) -> Array:
        means: Array = self.tables[:, 0].sum(axis=1) / self.behaviours[:, None]
        return means


def households(bundle: Bundle, dataset: Dataset, begin: int, end: int | None) -> Households:
    reader = open_histories(bundle, str(dataset.folder.resolve()), dataset.manifest.digest)
    tables, behaviours, past, following = [], [], [], []
    for shard in range(dataset.manifest.shards):
        whole, before = reader.shard(shard), reader.shard(shard).before(begin)
        for user in range(len(whole)):
            own, earlier = whole.of(user), before.of(user)
            times, rows = whole.times[own], whole.rows[own]
            later = rows[(times >= begin) & (times < (end or times[-1] + 1)) & (rows >= 0)]
            if not len(later) or earlier.start == earlier.stop:
                continue
            record = record_of_user(bundle, before, user, begin)
            tables.append(record.table / 2**16)
            behaviours.append(record.behaviours)
            met, times_met = np.unique(before.rows[earlier], return_counts=True)
            past.append(met[np.argsort(-times_met, kind="stable")])
            following.append(np.unique(later))
    return Households(
        tables=np.stack(tables),
        behaviours=np.array(behaviours, float),
        past=past,
        following=following,
    )


def unit(x: Array) -> Array:
    scaled: Array = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
    return scaled


def best(items: Array, queries: Array, count: int) -> Iterator[Rows]:
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(np.ascontiguousarray(items, np.float32))
    yield from index.search(np.ascontiguousarray(queries, np.float32), count)[1]


def shares(asked: Households, found: Iterator[Rows]) -> tuple[float, float]:
    """Return the mean share of next purchases among 500 items, of all and of first-time ones."""
    every, first = [], []
    for rows, past, wanted in zip(found, asked.past, asked.following, strict=True):
        every.append(np.isin(wanted, rows[:AT]).mean())
        new = np.setdiff1d(wanted, past)
        if len(new):
            first.append(np.isin(new, rows[~np.isin(rows, past)][:AT]).mean())
    return float(np.mean(every)), float(np.mean(first))


def fitted(vectors: Array, counts: Array, asked: Households, count: int) -> Iterator[Rows]:
    """Rank as the index does, exactly."""
    own = Space.fit(vectors.astype(np.float32), counts, asked.means, asked.behaviours)
    places = own.place(vectors.astype(np.float32), counts).astype(float)
    yield from best(places, own.queries(asked.means, asked.behaviours).astype(float), count)


def rivals(
    vectors: Array, counts: Array, asked: Households
) -> dict[str, Callable[[], Iterator[Rows]]]:
    many = AT + max(map(len, asked.past))
    total = asked.tables.sum(axis=(1, 2))
    buckets = unit(asked.tables).mean(axis=(1, 2))
    popular = np.argsort(-counts, kind="stable")[:many]
    one = np.ones((len(total), 1))
    met = np.log1p(counts)[:, None]
    with_popularity = {
        f"sum, cosine, + {w} log(1 + count)": partial(
            best, np.hstack([unit(vectors), w * met]), np.hstack([unit(total), one]), many
        )
        for w in (0.2, 0.3, 0.5)
    }
    return {
        "bought most by all": lambda: iter([popular] * len(total)),
        "own past, bought most": lambda: iter(asked.past),
        "sum of behaviours": partial(best, vectors, total, many),
        "sum of behaviours, cosine": partial(best, unit(vectors), total, many),
        "mean of unit buckets": partial(best, vectors, buckets, many),
        "mean of unit buckets, cosine": partial(best, unit(vectors), buckets, many),
        **with_popularity,
        "two normal clouds (the index)": partial(fitted, vectors, counts, asked, many),
    }


def rank_user_vectors(bundle: Bundle, dataset: Dataset) -> None:
    vectors = item_vectors(bundle).astype(float)
    begin, end = moment(dataset, "validation"), moment(dataset, "test")
    for split, begins, ends in (("validation", begin, end), ("test", end, None)):
        asked = households(bundle, dataset, begins, ends)
        counts = read(bundle, dataset, begins).counts
        print(f"\n{split}: {len(asked.past):,} households".ljust(46) + "of all  of first-time")
        for name, found in rivals(vectors, counts, asked).items():
            every, first = shares(asked, found())
            print(f"{name:<44} {every:.4f}  {first:.4f}")
        if split == "validation":
            choose(vectors, counts, asked)


def choose(vectors: Array, counts: Array, asked: Households) -> None:
    many = AT + max(map(len, asked.past))
    chosen = space.RIDGE, space.SHRINKAGE
    for ridge in (0.1, 0.25, 0.5, 1.0, 2.0):
        for shrinkage in (0, 10, 30, 100):
            space.RIDGE, space.SHRINKAGE = ridge, shrinkage
            every, first = shares(asked, fitted(vectors, counts, asked, many))
            print(f"  ridge {ridge:<4}, shrinkage {shrinkage:<24} {every:.4f}  {first:.4f}")
    space.RIDGE, space.SHRINKAGE = chosen


def made_up() -> tuple[NDArray[np.float32], Array, Sample]:
    random = np.random.default_rng(0)
    tastes = 2 * random.standard_normal((TASTES, SIZE))
    taste = random.integers(TASTES, size=ITEMS)
    vectors = (tastes[taste] + random.standard_normal((ITEMS, SIZE))).astype(np.float32)
    counts = np.floor(random.pareto(1.0, ITEMS))
    by_taste = [np.flatnonzero(taste == i) for i in range(TASTES)]
    seen = [
        np.concatenate([random.choice(by_taste[i], 40) for i in random.integers(TASTES, size=5)])
        for _ in range(2 * ASKED)
    ]
    means = np.stack([vectors[rows].mean(axis=0, dtype=float) for rows in seen])
    behaviours = np.full(len(seen), 200.0)
    return vectors, counts, Sample(means=means, behaviours=behaviours, seen=seen, words="made up")


def timed(search: Callable[[int], Rows], truth: list[Rows]) -> str:
    spent, found = [], []
    for i in range(len(truth)):
        begun = time.thread_time()
        found.append(search(i))
        spent.append(time.thread_time() - begun)
    recall = np.mean([np.isin(t, f).mean() for t, f in zip(truth, found, strict=True)])
    p50, p99 = np.percentile(spent, [50, 99]) * 1e3
    return f"{p50:6.3f} {p99:6.3f} {recall:8.4f}"


def time_searches(
    name: str, bundle: Bundle, vectors: NDArray[np.float32], counts: Array, sample: Sample
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with patch.object(building, "item_vectors", lambda _: vectors):
            manifest = build_index(
                bundle, Path(folder), counts=counts, sample=sample, data_digest="", as_of=0
            )
        index = RetrievalIndex.open(folder, bundle)
    queries = index.space.queries(sample.means, sample.behaviours)[1::2][:ASKED]
    seen = (sample.seen or [])[1::2][:ASKED]
    places = index.space.place(vectors, counts)
    exact = faiss.IndexFlatIP(places.shape[1])
    exact.add(places)
    # As everyone turns inner products into distances: one component more makes all norms equal.
    squares = (places**2).sum(axis=1)
    level = np.sqrt(squares.max() - squares)[:, None]
    graph = faiss.IndexHNSWFlat(places.shape[1] + 1, 32)
    begun = time.perf_counter()
    graph.add(np.hstack([places, level]))
    built = time.perf_counter() - begun
    truth = [exact.search(query[None], AT)[1][0] for query in queries]
    cells = index.looking_into(manifest.nlist)
    rest = [cells.find(q, AT, excluded=s).rows for q, s in zip(queries, seen, strict=True)]
    title = f"{name}: {AT} of {len(places):,} items, CPU ms of one thread"
    print(f"\n{title:<56}    p50    p99   recall")
    print(f"{'exact':<56}", timed(lambda i: exact.search(queries[i][None], AT)[1][0], truth))
    longer = np.hstack([queries, np.zeros((len(queries), 1), np.float32)])
    for reach in (512, 1024):
        graph.hnsw.efSearch = reach
        words = f"HNSW 32, reach {reach}, built in {built:.0f} s"
        print(f"{words:<56}", timed(lambda i: graph.search(longer[i][None], AT)[1][0], truth))
    words = f"index, {manifest.nprobe} of {manifest.nlist} cells, built in {manifest.seconds:.0f} s"
    print(f"{words:<56}", timed(lambda i: index.find(queries[i], AT).rows, truth))
    print(
        f"{'index, without what the user has seen':<56}",
        timed(lambda i: index.find(queries[i], AT, excluded=seen[i]).rows, rest),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--data", default="data/complete_journey")
    settings = parser.parse_args()
    faiss.omp_set_num_threads(1)
    bundle, dataset = Bundle.open(settings.bundle), Dataset.open(settings.data)
    rank_user_vectors(bundle, dataset)
    met = read(bundle, dataset, moment(dataset, "test"))
    time_searches("demo", bundle, item_vectors(bundle), met.counts, met.sample)
    time_searches("made up", bundle, *made_up())


if __name__ == "__main__":
    main()
