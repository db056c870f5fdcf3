"""SDIM: hash-sampled attention over a user's whole history."""

from hashtab.kernels.sdim.api import attend, attend_at, codes, encode, expected, read
from hashtab.kernels.sdim.reasons import explain

__all__ = ["attend", "attend_at", "codes", "encode", "expected", "explain", "read"]
