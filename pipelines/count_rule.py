"""The untrained bar: what a user took before, the user takes again."""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashtab.features.dataset import Batch, Dataset
from hashtab.pipelines.evaluation import Predictions

ITEM_WEIGHT = 10


@dataclass(frozen=True, kw_only=True)
class RuleResult:
    """Metrics of the count rule by split, and the seconds it took to score them."""

    metrics: dict[str, dict[str, float]]
    seconds: float


def count_scores(batch: Batch, counters: tuple[str, ...], item: str) -> NDArray[np.float64]:
    """Return 10 x (times the user met the item) + the other counters' counts, `[Q]`.

    Args:
        batch: with the counters log(1 + count).
        counters: names of the counters, in their order.
        item: name of the item feature, whose own counter is not counted again.
    """
    others = [i for i, name in enumerate(counters) if name != item]
    counts = np.expm1(batch.counters[:, others].astype(np.float64)).sum(axis=1)
    scores: NDArray[np.float64] = ITEM_WEIGHT * batch.item_counts + np.rint(counts)
    return scores


def apply_count_rule(dataset: Dataset, splits: tuple[str, ...]) -> RuleResult:
    """Score whole splits with the rule; its scores are no probabilities, so it has no log loss."""
    begun = time.perf_counter()
    manifest = dataset.manifest
    found = {}
    for split in splits:
        parts = [
            Predictions.of(
                batch,
                count_scores(batch, manifest.features.counters, manifest.schema.item_name),
            )
            for batch in dataset.batches(split, history_limit=1)
        ]
        found[split] = Predictions.join(parts).metrics(probabilities=False)
    return RuleResult(metrics=found, seconds=time.perf_counter() - begun)
