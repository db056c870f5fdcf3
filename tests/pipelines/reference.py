"""What records and scores must be: from raw logs by plain loops, and from the model in torch."""

import bisect
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from hashtab.kernels import sdim
from hashtab.models.ctr import TensorBatch
from hashtab.pipelines.saved_model import load_model
from hashtab.serving.manifest import BundleManifest
from hashtab.serving.store import UserRecord

Row = dict[str, Any]


def likes_log(data: Path) -> pl.DataFrame:
    """Return the raw behaviours of `likes`: user, item, time in microseconds."""
    log = pl.read_parquet(data.parent / "raw" / "watched.parquet")
    return log.select("user", "item", time=pl.col("at").dt.epoch("us"))


def likes_items(data: Path) -> pl.DataFrame:
    return pl.read_parquet(data.parent / "raw" / "items.parquet")


def shop_log(data: Path) -> pl.DataFrame:
    """Return the raw behaviours of `shop`, with their side features."""
    log = pl.read_parquet(data.parent / "raw" / "purchases.parquet").unique()
    return log.select(
        "store",
        "price",
        user="household",
        item="product",
        time=pl.col("at").dt.epoch("us"),
        tie=pl.struct("basket", "price"),
    )


def shop_items(data: Path) -> pl.DataFrame:
    return pl.read_parquet(data.parent / "raw" / "items.parquet").rename({"product": "item"})


class Reference:
    """One bundle's model and one raw log, each behaviour looked at by itself.

    Args:
        bundle: folder; the model in torch lies beside it.
        log: `user`, `item`, `time` and side features, raw; `tie` orders what shares all but that.
        items: `item` and its features, raw.
    """

    def __init__(self, bundle: Path, log: pl.DataFrame, items: pl.DataFrame) -> None:
        self.manifest = BundleManifest.read(bundle)
        self.model = load_model(bundle.parent / "model")
        self.learned = json.loads((bundle / "encoders.json").read_text())
        self.known = pl.read_ipc(bundle / "catalogue.arrow")["_item"].to_list()
        self.items = {row.pop("item"): row for row in items.iter_rows(named=True)}
        self.log: dict[Any, list[Row]] = {}
        order = ["time", "item", *(["tie"] if "tie" in log.columns else [])]
        for row in log.unique().sort(order).iter_rows(named=True):
            self.log.setdefault(row["user"], []).append(row)

    def times(self) -> list[int]:
        """Return when anything happened, ascending."""
        return sorted(row["time"] for rows in self.log.values() for row in rows)

    def past(self, user: Any, before: int) -> list[Row]:
        """Return what the user did strictly before a moment, in time order."""
        return [row for row in self.log.get(user, []) if row["time"] < before]

    def record(self, user: Any, as_of: int) -> UserRecord:
        """Return the record of a user as of a moment."""
        layout, limit = self.manifest.layout, self.manifest.history_limit
        past = self.past(user, as_of)
        kept = past[-limit:] if limit else past
        recent = past[len(past) - min(len(past), layout.recent) :]
        columns = self.columns(recent, [name for name, _ in layout.features])
        return UserRecord(
            revision=1,
            watermark=as_of,
            behaviours=len(kept),
            table=self._table(kept),
            recent_times=np.array([row["time"] for row in recent], np.int64),
            recent={name: column.numpy() for name, column in columns.items()},
            counters={name: self._counted(name, past) for name in layout.counters},
            events=np.empty(0, np.uint64),
        )

    def counts(self, past: Sequence[Row], item: Any) -> list[int]:
        """Return how often each counter's value of an item comes in a past."""
        wanted = {name: self._value(name, item) for name in self.manifest.features.counters}
        return [
            sum(value > 0 and self._value(name, row["item"]) == value for row in past)
            for name, value in wanted.items()
        ]

    @torch.inference_mode()
    def scores(
        self,
        user: Any,
        before: int,
        candidates: Sequence[Any],
        context: Mapping[str, Sequence[Any]],
    ) -> np.ndarray:
        """Return the model's probabilities of candidates, their context given raw, one for each."""
        features, past = self.model.features, self.past(user, before)
        asked = [{"item": item} for item in candidates]
        shown = [
            dict(zip(context, row, strict=True)) for row in zip(*context.values(), strict=True)
        ]
        counters = [self.counts(past, item) for item in candidates]
        batch = TensorBatch(
            history_offsets=torch.tensor([0, len(past)]),
            behaviours=self.columns(past, [f.name for f in features.behaviour]),
            sample_offsets=torch.tensor([0, len(candidates)]),
            cuts=torch.full((len(candidates),), len(past)),
            candidates=self.columns(asked, [f.name for f in features.candidate]),
            context={f.name: self._context(f.name, shown) for f in features.context},
            counters=torch.tensor(counters).reshape(len(candidates), -1).float().log1p(),
            labels=torch.zeros(len(candidates)),
        )
        scores: np.ndarray = self.model(batch).sigmoid().numpy()
        return scores

    def columns(self, rows: Sequence[Row], names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return features of rows with an item and side features, `[len(rows)]` each."""
        return {name: self._tensor(name, [self._encoded(name, r) for r in rows]) for name in names}

    def _table(self, kept: Sequence[Row]) -> np.ndarray:
        layout, model = self.manifest.layout, self.model
        table = np.zeros(layout.shape, np.int64)
        if not layout.groups or not kept:
            return table.astype(np.int32)
        with torch.inference_mode():
            names = [f.name for f in model.features.behaviour]
            vectors = model.objects(self.columns(kept, names), model.features.behaviour)
            planes = [v for name, v in model.state_dict().items() if name.endswith("planes")]
            codes = [[0]] * len(kept)  # a table of one bucket
            if planes:
                codes = sdim.codes(vectors, planes[0], model.settings.tau).tolist()
        for vector, buckets in zip(vectors.double().tolist(), codes, strict=True):
            for group, bucket in enumerate(buckets):
                for component, value in enumerate(vector):
                    table[group, bucket, component] += round(value * 65536)
        return table.astype(np.int32)

    def _counted(self, name: str, past: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        met = Counter(self._value(name, row["item"]) for row in past)
        pairs = sorted((value, count) for value, count in met.items() if value)
        return (
            np.array([value for value, _ in pairs], np.uint32),
            np.array([count for _, count in pairs], np.uint32),
        )

    def _value(self, name: str, item: Any) -> int:
        """What a counter takes an item for; 0 is counted nowhere."""
        if item not in self.known:
            return 0
        if name == self.manifest.item:
            return 1 + bisect.bisect_left(self.known, item)
        value = self._id(name, self.items[item][name])
        return 0 if value == 1 else value

    def _encoded(self, name: str, row: Row) -> float:
        if name == self.manifest.item:
            return self._id(name, row["item"])
        if name in self.manifest.items:
            known = row["item"] in self.known
            raw = self.items[row["item"]][name] if known else None
            return self._plain(name, raw)
        return self._plain(name, row[name])

    def _plain(self, name: str, raw: Any) -> float:
        if "values" in self.learned[name]:
            return self._id(name, raw)
        if raw is None or not math.isfinite(raw):
            return 0.0
        mean, std = (float(self.learned[name][part]) for part in ("mean", "std"))
        return (float(raw) - mean) / std

    def _id(self, name: str, raw: Any) -> int:
        values = self.learned[name]["values"]
        return 2 + values.index(raw) if raw in values else 1

    def _context(self, name: str, shown: Sequence[Row]) -> torch.Tensor:
        if name not in self.manifest.time_features:
            return self._tensor(name, [self._plain(name, row[name]) for row in shown])
        times = [row["time"] and row["time"].replace(tzinfo=UTC) for row in shown]
        made = [t and (t.hour if name == "hour" else t.weekday()) for t in times]
        return torch.tensor([1 if m is None else 2 + m for m in made], dtype=torch.int32)

    def _tensor(self, name: str, values: Sequence[float]) -> torch.Tensor:
        ids = "values" in self.learned[name]
        return torch.tensor(values, dtype=torch.int32 if ids else torch.float32)


def at(time: int) -> str:
    """Write a moment as --as_of takes it."""
    return datetime.fromtimestamp(time / 1e6, UTC).replace(tzinfo=None).isoformat()
