"""Checks of the input before any long work."""

from hashtab.features.schema import Schema


def check(schema: Schema) -> None:
    """Check."""
