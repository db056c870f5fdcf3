"""The definition in PyTorch, on any device and in any floating dtype."""

import torch
from torch import Tensor


def embed(linear: Tensor, place: Tensor, missing: Tensor, weight: Tensor) -> Tensor:
    """Return embeddings `[S, F, B, D]`; arguments as the operator's."""
    bins = torch.arange(weight.shape[2] - 2, device=weight.device)
    filled = (place[..., None] - bins).clamp(0, 1)
    others = torch.stack([linear, missing.to(linear)], -1)
    return torch.cat([filled, others], -1) @ weight
