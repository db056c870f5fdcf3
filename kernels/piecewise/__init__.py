"""Piecewise linear embeddings of numbers, for several networks at once."""

from hashtab.kernels.core.dispatch import Impl
from hashtab.kernels.piecewise.api import embed

__all__ = ["Impl", "embed"]
