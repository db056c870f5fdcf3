"""Data sets that hashtab knows by name; each is nothing but a schema."""

from collections.abc import Callable

from hashtab.features.datasets import complete_journey, kuairand
from hashtab.features.schema import Schema

SCHEMAS: dict[str, Callable[[], Schema]] = {
    "complete_journey": complete_journey.schema,
    "kuairand": kuairand.schema,
}

__all__ = ["SCHEMAS"]
