"""What several operators share: the ragged layout, argument checks, dispatch, native code."""

from hashtab.kernels.core.dispatch import Impl
from hashtab.kernels.core.ragged import to_ragged

__all__ = ["Impl", "to_ragged"]
