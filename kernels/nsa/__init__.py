"""Native sparse attention (arXiv 2502.11089), causal and bidirectional."""

from hashtab.kernels.core.dispatch import Impl
from hashtab.kernels.nsa.api import importance, native_sparse_attention, selected_blocks
from hashtab.kernels.nsa.blocks import block_members, blocks, compress_mean

__all__ = [
    "Impl",
    "block_members",
    "blocks",
    "compress_mean",
    "importance",
    "native_sparse_attention",
    "selected_blocks",
]
