"""Exact metrics of a model on a split, whatever number of workers shares the work."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hashtab.features.dataset import Batch, Dataset
from hashtab.features.metrics import Metrics, standard_slices
from hashtab.models.ctr import ClickModel, TensorBatch
from hashtab.pipelines.ranks import Ranks
from hashtab.pipelines.settings import OptimiserSettings

CALIBRATION_GROUPS = 20


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Scored samples, all arrays `[Q]`.

    Args:
        labels: 0 or 1.
        scores: probabilities, or another scale where the metrics are told so.
        users: whose sample it is.
        history_lengths: behaviours before the request.
        item_counts: times the user had met the item before.
    """

    labels: NDArray[np.float32]
    scores: NDArray[np.float64]
    users: NDArray[np.int64]
    history_lengths: NDArray[np.int64]
    item_counts: NDArray[np.int32]

    @classmethod
    def of(cls, batch: Batch, scores: NDArray[Any]) -> Self:
        """Join a batch with its samples' scores."""
        return cls(
            labels=batch.labels,
            scores=scores,
            users=np.repeat(batch.users, np.diff(batch.sample_offsets)),
            history_lengths=batch.history_lengths,
            item_counts=batch.item_counts,
        )

    @classmethod
    def join(cls, parts: Iterable[Self]) -> Self:
        """Concatenate at least one part."""
        several = list(parts)
        return cls(
            **{
                f.name: np.concatenate([getattr(part, f.name) for part in several])
                for f in fields(cls)
            }
        )

    def metrics(self, *, probabilities: bool = True) -> dict[str, float]:
        """Return all metrics by name, those of a slice as `<metric>/<slice>`."""
        metrics = Metrics(probabilities=probabilities)
        slices = standard_slices(self.history_lengths, self.item_counts)
        metrics.update(self.labels, self.scores, self.users, slices=slices)
        return metrics.compute()

    def calibration(self) -> tuple[tuple[float, ...], ...]:
        """Return (mean prediction, share of positives) of equally many samples each, rising."""
        return calibration_groups(self.labels, self.scores)


def calibration_groups(labels: NDArray[Any], scores: NDArray[Any]) -> tuple[tuple[float, ...], ...]:
    """Return (mean score, mean label) of equally many samples each, in the order of the scores.

    Args:
        labels: `[Q]`.
        scores: `[Q]`.
    """
    order = np.argsort(scores, kind="stable")
    groups = np.array_split(order, min(CALIBRATION_GROUPS, len(order)))
    return tuple((float(scores[g].mean()), float(labels[g].mean())) for g in groups)


def predict(
    model: ClickModel,
    dataset: Dataset,
    split: str,
    settings: OptimiserSettings,
    ranks: Ranks,
) -> Predictions | None:
    """Score a split with `model`, each user on one worker; None on all workers but the first.

    In float32 on every device, as the model is served: what training rounds to bfloat16, its hashes
    included, is not rounded here.
    """
    model.eval()
    per_rank = max(1, settings.samples_per_batch // ranks.size)
    limit = model.settings.history_limit
    batches = dataset.batches(split, per_rank, limit, rank=ranks.rank, world_size=ranks.size)
    parts = [Predictions.of(batch, _probabilities(model, batch, ranks.device)) for batch in batches]
    gathered = ranks.gather(Predictions.join(parts))
    return Predictions.join(gathered) if gathered else None


@torch.inference_mode()
def _probabilities(model: ClickModel, batch: Batch, device: torch.device) -> NDArray[np.float64]:
    logits: Tensor = model(TensorBatch.from_numpy(batch).to(device))
    # In float64, so that confident scores stay apart and ranks are those of the logits.
    probabilities: NDArray[np.float64] = logits.double().sigmoid().cpu().numpy()
    return probabilities
