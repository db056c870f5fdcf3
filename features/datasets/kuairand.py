"""KuaiRand: short videos that were shown, with true clicks, after a history of watched ones."""

from pathlib import Path

import polars as pl

from hashtab.features.errors import DataError
from hashtab.features.schema import Behaviours, Context, Exposures, Items, Schema, Split

# Old watches have an order but no times: they are laid one second apart before the last one.
_SPACING_MS = 1000


def schema(folder: str | Path = "data/raw/kuairand") -> Schema:
    """Click on the next video: behaviours are long watches before 25 April, then clicks.

    Args:
        folder: with `exposures_*.parquet`, `item_features.parquet` and
            `user_history_before_0425_last50.parquet`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"KuaiRand is not at {folder}; put its Parquet files there")
    exposures = str(folder / "exposures_*.parquet")
    return Schema(
        name="kuairand",
        behaviours=Behaviours(
            files=(exposures, str(folder / "user_history_before_0425_last50.parquet")),
            reader=f"{__name__}:behaviours",
            user="user_id",
            item="video_id",
            time="time_ms",
            time_unit="ms",
        ),
        exposures=Exposures(
            files=exposures,
            user="user_id",
            item="video_id",
            time="time_ms",
            time_unit="ms",
            label="is_click",
        ),
        items=Items(
            files=str(folder / "item_features.parquet"),
            item="video_id",
            # Its counts are totals over the whole period, which no request could know.
            categorical=("author_id", "tag", "video_type", "upload_type", "music_id"),
            numeric=("video_duration",),
        ),
        context=Context(time=("hour", "weekday"), categorical=("tab",)),
        counters=("video_id", "author_id", "tag"),
        split=Split(
            train_until="2022-04-28T23:59:59.999+08:00",
            validate_until="2022-04-30T23:59:59.999+08:00",
        ),
    )


def behaviours(files: list[Path]) -> pl.LazyFrame:
    """Read the clicks of the exposures and the untimed list of older long watches as one log."""
    columns = ("user_id", "video_id", "time_ms")
    older = [path for path in files if path.name.startswith("user_history")]
    clicks = pl.scan_parquet([path for path in files if path not in older])
    back = pl.int_range(pl.len()).reverse().over("user_id") * _SPACING_MS
    watched = (
        pl.scan_parquet(older)
        .select("user_id", pl.col("long_watch_seq").alias("video_id"), "last_time_ms")
        .explode("video_id")
        .drop_nulls("video_id")
        .with_columns(time_ms=pl.col("last_time_ms") - back)
    )
    return pl.concat([watched.select(columns), clicks.filter(is_click=1).select(columns)])
