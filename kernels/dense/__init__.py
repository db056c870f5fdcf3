"""Exact attention: the rival of every approximation, and its oracle."""

from hashtab.kernels.dense.api import (
    Impl,
    TargetImpl,
    target_attention,
    target_attention_at,
    window_attention,
)

__all__ = ["Impl", "TargetImpl", "target_attention", "target_attention_at", "window_attention"]
