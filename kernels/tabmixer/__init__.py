"""The TabMixer: an MLP over columns and one over features, joined by product; and its layers."""

from hashtab.kernels.core.dispatch import Impl
from hashtab.kernels.tabmixer.api import Weights, layer_norm, linear, tab_mixer

__all__ = ["Impl", "Weights", "layer_norm", "linear", "tab_mixer"]
