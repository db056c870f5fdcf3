"""The TabMixer's definition in PyTorch, on any device and in any floating dtype."""

import torch
from torch import Tensor
from torch.nn import functional

_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def tab_mixer(x: Tensor, weights: list[Tensor], seeds: Tensor | None, threshold: int) -> Tensor:
    """Return the mixed tokens `[S, T, R, D]`; arguments as the operator's.

    Args:
        x: `[S, T, R, D]`, tokens.
        weights: those of `api.Weights`, in its order.
        seeds: `[3]` int64, of the three dropouts; None where nothing is dropped.
        threshold: 256 times the rate of dropout.
    """
    norm, columns_in, columns_out, features_in, features_out, out_norm = (
        weights[i : i + 2] for i in range(0, 12, 2)
    )
    y = layer_norm(x, *norm)
    hidden = torch.baddbmm(columns_in[1], columns_in[0], y.flatten(2)).relu()
    hidden = _dropout(hidden, seeds, 0, threshold)
    columns = torch.baddbmm(columns_out[1], columns_out[0], hidden).view(x.shape)
    hidden = torch.baddbmm(features_in[1], y.flatten(1, 2), features_in[0]).relu()
    hidden = _dropout(hidden, seeds, 1, threshold)
    features = torch.baddbmm(features_out[1], hidden, features_out[0]).view(x.shape)
    joined = layer_norm(features * functional.gelu(columns), *out_norm)
    return _dropout(functional.silu(joined), seeds, 2, threshold)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise each token of `[S, T, R, D]`, with `[S, 1, 1, D]` weights and biases."""
    return torch.addcmul(bias, functional.layer_norm(x, x.shape[-1:]), weight)


def random_bytes(seed: Tensor, count: int, device: torch.device) -> Tensor:
    """Return uint8 `[count]`, the bytes of splitmix64's words (Steele et al., 2014) of a seed."""
    z = seed.to(device) + _STEP * torch.arange((count + 7) // 8, device=device)
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    z = z ^ _shifted(z, 31)
    return z.view(torch.uint8)[:count]


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift int64 right as if it were unsigned."""
    return (z >> bits).bitwise_and(2 ** (64 - bits) - 1)


def _dropout(x: Tensor, seeds: Tensor | None, which: int, threshold: int) -> Tensor:
    """Drop what draws a byte below the threshold, and scale the rest up."""
    if seeds is None or threshold == 0:
        return x
    drawn = random_bytes(seeds[which], x.numel(), x.device).view(x.shape)
    return x * (drawn >= threshold) * (256 / (256 - threshold))
