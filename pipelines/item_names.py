"""Names of items for people to read, made of what a bundle's catalogue says of each item."""

from pathlib import Path

import polars as pl

from hashtab.features.encoders import FIRST_ID, Vocabulary
from hashtab.serving.bundle import Bundle


def write_names(bundle_folder: Path, target: Path) -> bool:
    """Write a Parquet file with columns `item` and `name`: each item's text features, and the item.

    Args:
        bundle_folder: of a click model.
        target: file.

    Returns:
        Whether there was anything to write: False where no feature of an item is text.

    Raises:
        BundleError: if the bundle cannot be used.
    """
    bundle = Bundle.open(bundle_folder)
    catalogue, manifest = bundle.catalogue, bundle.manifest
    parts = []
    for name in manifest.items:
        encoder = bundle.encoders[name]
        if name == manifest.item or not isinstance(encoder, Vocabulary):
            continue
        if encoder.values and isinstance(encoder.values[0], str):
            values = pl.Series(name, [None] * FIRST_ID + list(encoder.values), dtype=pl.String)
            parts.append(values.gather(catalogue.features[name][: len(catalogue)]))
    if not parts:
        return False
    items = catalogue.items.alias("item")
    texts = pl.concat_str([*parts, items.cast(pl.String)], separator=", ", ignore_nulls=True)
    pl.select(items, name=texts).write_parquet(target)
    return True
