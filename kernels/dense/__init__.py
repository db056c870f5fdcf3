"""Exact attention: the rival of every approximation, and its oracle."""

from hashtab.kernels.dense.api import (
    Impl,
    target_attention,
    target_attention_at,
    window_attention,
)

__all__ = ["Impl", "target_attention", "target_attention_at", "window_attention"]
