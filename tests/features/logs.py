"""Small synthetic logs: a shop with promotions (nothing labelled) and a feed with clicks."""

import dataclasses
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from hashtab.features.schema import (
    Behaviours,
    Context,
    Exposures,
    Items,
    Negatives,
    Pool,
    Schema,
    Split,
)

START = datetime(2023, 1, 2)
WEEKS, STORES, ITEMS, USERS = 10, 3, 40, 25


def shop(folder: Path, seed: int = 0) -> Schema:
    """Write purchases, items and promotions of a shop; weeks 1 to 6 train, 7 and 8 validate."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    purchases(rng).write_parquet(folder / "purchases.parquet")
    item_table(rng).write_parquet(folder / "items.parquet")
    promotions(rng).write_parquet(folder / "promotions.parquet")
    return shop_schema(folder)


def shop_schema(folder: Path) -> Schema:
    return Schema(
        name="shop",
        behaviours=Behaviours(
            files=str(folder / "purchases.parquet"),
            user="household",
            item="product",
            time="at",
            session="basket",
            categorical=("store",),
            numeric=("price",),
        ),
        items=Items(
            files=str(folder / "items.parquet"),
            item="product",
            categorical=("kind",),
            numeric=("size",),
        ),
        pool=Pool(
            files=str(folder / "promotions.parquet"),
            item="product",
            on=("store", "week"),
            categorical=("display",),
        ),
        negatives=(
            Negatives(name="matched", scheme="popularity", per_positive=3),
            Negatives(name="uniform", scheme="uniform", per_positive=2),
        ),
        once_per="week",
        context=Context(time=("hour", "weekday")),
        counters=("product", "kind"),
        split=Split(column="week", train_until=6, validate_until=8),
    )


def purchases(rng: np.random.Generator) -> pl.DataFrame:
    """Baskets with popular and rare products; the last weeks have products that are new."""
    baskets = 8 * USERS * WEEKS // 4
    week = rng.integers(1, WEEKS + 1, baskets)
    second = rng.integers(0, 7 * 24 * 3600, baskets)
    size = rng.integers(1, 7, baskets)
    of = np.repeat(np.arange(baskets), size)
    product = np.minimum(rng.geometric(0.08, len(of)), ITEMS - 4) - 1
    new = (week[of] > 6) & (rng.random(len(of)) < 0.1)
    product = np.where(new, rng.integers(ITEMS - 4, ITEMS, len(of)), product)
    seconds = (week[of] - 1) * 7 * 24 * 3600 + second[of]
    return pl.DataFrame(
        {
            "household": rng.integers(100, 100 + USERS, baskets)[of],
            "basket": of + 10_000,
            "product": product * 7,
            "store": rng.integers(0, STORES, baskets)[of],
            "week": week[of],
            "at": [START + timedelta(seconds=int(s)) for s in seconds],
            "price": np.round(rng.gamma(2.0, 3.0, len(of)), 2),
        }
    )


def item_table(rng: np.random.Generator) -> pl.DataFrame:
    kinds = [None if i % 9 == 8 else f"kind-{i % 5}" for i in range(ITEMS)]
    sizes = [float("nan") if i % 11 == 10 else float(rng.integers(1, 20)) for i in range(ITEMS)]
    return pl.DataFrame({"product": np.arange(ITEMS) * 7, "kind": kinds, "size": sizes})


def promotions(rng: np.random.Generator) -> pl.DataFrame:
    """Three quarters of all products in each store and week, some listed twice."""
    rows = [
        (item * 7, store, week, f"d{rng.integers(0, 4)}")
        for store in range(STORES)
        for week in range(1, WEEKS + 1)
        for item in range(ITEMS)
        if rng.random() < 0.75
        for _ in range(1 + (rng.random() < 0.05))
    ]
    return pl.DataFrame(rows, schema=["product", "store", "week", "display"], orient="row")


def feed(folder: Path, seed: int = 0) -> Schema:
    """Write impressions with clicks, and older watches as a log of its own."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    impressions(rng).write_parquet(folder / "impressions.parquet")
    watches(rng).write_parquet(folder / "watches.parquet")
    return feed_schema(folder)


def feed_schema(folder: Path) -> Schema:
    return Schema(
        name="feed",
        behaviours=Behaviours(
            files=str(folder / "watches.parquet"),
            user="who",
            item="video",
            time="ms",
            time_unit="ms",
        ),
        exposures=Exposures(
            files=str(folder / "impressions.parquet"),
            user="who",
            item="video",
            time="ms",
            time_unit="ms",
            label="clicked",
        ),
        context=Context(categorical=("tab",), numeric=("load",)),
        counters=("video",),
        split=Split(train_until="2023-01-20", validate_until="2023-01-25T12:00:00"),
    )


def clicks_only(schema: Schema) -> Schema:
    """The same feed without a log of watches: clicks are the behaviours."""
    return dataclasses.replace(schema, behaviours=None, context=Context())


def impressions(rng: np.random.Generator, rows: int = 1500) -> pl.DataFrame:
    start = int(START.timestamp()) * 1000
    # Few distinct times, so that requests and behaviours often share one.
    ms = start + rng.integers(0, 30 * 24 * 12, rows) * 300_000
    return pl.DataFrame(
        {
            "who": [f"u{n}" for n in rng.integers(0, 30, rows)],
            "video": [f"v{n}" for n in rng.integers(0, 60, rows)],
            "ms": ms,
            "clicked": (rng.random(rows) < 0.4).astype(np.int64),
            "tab": rng.integers(0, 3, rows),
            "load": rng.normal(5.0, 2.0, rows),
        }
    )


def watches(rng: np.random.Generator, rows: int = 1200) -> pl.DataFrame:
    return impressions(rng, rows).select("who", "video", "ms")
