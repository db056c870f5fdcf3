"""Token mixers: modules that let the tokens of a sequence or a table's row see each other."""

from hashtab.models.mixers.native_sparse_attention import NativeSparseAttention

__all__ = ["NativeSparseAttention"]
