"""Samples of a split scored in torch as a table of an earlier moment sees them: the past alone."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hashtab.features.counters import count_before
from hashtab.features.dataset import Dataset
from hashtab.features.histories import Histories, HistoryReader
from hashtab.features.metrics import Metrics
from hashtab.features.sources import LABEL
from hashtab.features.storage import Array, map_arrow
from hashtab.features.tables import INDEX, ROW
from hashtab.models.ctr import ClickModel, TensorBatch


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Samples with scores, all `[Q]`.

    Args:
        labels: 0 or 1.
        scores: probabilities.
        users: whose sample it is.
    """

    labels: NDArray[np.float32]
    scores: NDArray[np.float64]
    users: NDArray[np.int64]

    def metrics(self) -> dict[str, float]:
        """Return all metrics by name."""
        metrics = Metrics(probabilities=True)
        metrics.update(self.labels, self.scores, self.users)
        return metrics.compute()


def score_as_of(model: ClickModel, dataset: Dataset, split: str, moment: int) -> Scored:
    """Score a split with each history cut at one moment, for every request alike.

    Args:
        model: trained on this data set.
        dataset: that holds the split.
        split: whose samples are scored, in the order of their shards.
        moment: microseconds since 1970 UTC; only what had happened strictly before it is seen.
    """
    reader = HistoryReader(dataset.folder)
    parts = [
        _score_shard(model, dataset, reader, split, shard, moment)
        for shard in range(dataset.manifest.shards)
    ]
    return Scored(
        labels=np.concatenate([part.labels for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        users=np.concatenate([part.users for part in parts]),
    )


@torch.inference_mode()
def _score_shard(
    model: ClickModel, dataset: Dataset, reader: HistoryReader, split: str, shard: int, moment: int
) -> Scored:
    histories = reader.shard(shard)
    samples = map_arrow(dataset.folder / "samples" / split / f"{shard:05d}.arrow")
    ends = map_arrow(dataset.folder / "users" / f"{shard:05d}.arrow")[f"{split}_end"]
    user_of = np.repeat(np.arange(len(histories)), np.diff(ends, prepend=0))
    features, past = dataset.manifest.features, histories.before(moment)
    items = [f.name for f in features.behaviour if f.name not in histories.side]
    candidates = [f.name for f in features.candidate]
    counters = _counters(reader, features.counters, histories, samples[ROW], user_of, moment)
    batch = TensorBatch(
        history_offsets=torch.from_numpy(np.append(histories.starts, len(histories.rows))),
        behaviours=_tensors(histories.side | reader.catalogue.columns(histories.rows, items)),
        sample_offsets=torch.from_numpy(np.append(0, ends).astype(np.int64)),
        cuts=torch.from_numpy((past.ends - past.starts)[user_of]),
        candidates=_tensors(reader.catalogue.columns(samples[ROW], candidates)),
        context=_tensors({f.name: samples[f.name] for f in features.context}),
        counters=torch.from_numpy(counters),
        labels=torch.from_numpy(samples[LABEL].astype(np.float32)),
    )
    scores: NDArray[np.float64] = model(batch).double().sigmoid().numpy()
    return Scored(labels=batch.labels.numpy(), scores=scores, users=samples[INDEX].astype(np.int64))


def _counters(
    reader: HistoryReader,
    names: tuple[str, ...],
    histories: Histories,
    rows: Array,
    user_of: NDArray[np.int64],
    moment: int,
) -> NDArray[np.float32]:
    """Return log(1 + count before the moment), `[Q, K]`, counted as preparation counts."""
    past_user_of = np.repeat(np.arange(len(histories)), histories.ends - histories.starts)
    counts = np.zeros((len(rows), len(names)), np.float32)
    for k, name in enumerate(names):
        values = reader.catalogue.counted(name)
        width, wanted = int(values.max()) + 1, values[rows]
        groups, asked = past_user_of * width + values[histories.rows], user_of * width + wanted
        met = count_before(groups, histories.times, asked, np.full(len(rows), moment))
        counts[:, k] = np.where(wanted > 0, met, 0)
    return np.log1p(counts)


def _tensors(columns: dict[str, Array]) -> dict[str, torch.Tensor]:
    """Return columns as float32 or int32, whatever the width they are stored in."""
    return {
        name: torch.from_numpy(c.astype(np.float32 if c.dtype.kind == "f" else np.int32))
        for name, c in columns.items()
    }
