"""What each side must give, written plainly in float64 for a few users, and how far it is off."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from experiments.sdim_benchmark.batch import Batch

# Of RMS(error) / RMS(definition). In float32 a product within rounding of 0 may take either sign,
# which moves one behaviour to another bucket.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 2e-3}


def codes(x: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Return the bucket of each vector `[..., D]` in each group, `[..., G]` int64."""
    bits: Tensor = (x.detach().float() @ planes > 0).unflatten(-1, (-1, tau))
    return (bits * 2 ** torch.arange(tau, device=x.device)).sum(-1)


def encode(b: Batch) -> Tensor:
    """Return the table `[B, G, K, D]`."""
    keys = codes(b.values, b.planes, b.shape.tau)
    return torch.einsum("blgk,bld->bgkd", one_hot(keys, 2**b.shape.tau).double(), b.values)


def read(b: Batch) -> Tensor:
    """Return interests `[B, Q, D]` read from the table."""
    if b.table is None:
        raise ValueError("the batch has no table")
    keys = codes(b.queries, b.planes, b.shape.tau)
    user = torch.arange(b.shape.users, device=keys.device)[:, None]
    found = [b.table[user, g, key] for g, key in enumerate(keys.unbind(-1))]
    return torch.stack([_unit(rows) for rows in found]).mean(0)


def attend_at(b: Batch, last: int | None = None) -> Tensor:
    """Return interests `[B, Q, D]` in the behaviours before each cut, or the latest of them."""
    keys, wanted = (codes(x, b.planes, b.shape.tau) for x in (b.values, b.queries))
    seen = _seen(b)
    if last is not None:
        seen &= _position(b) >= b.cuts[..., None] - last
    interest = torch.zeros_like(b.queries)
    for key, want in zip(keys.unbind(-1), wanted.unbind(-1), strict=True):
        shared = seen & (key[:, None] == want[..., None])
        interest = interest + _unit(shared.to(b.values.dtype) @ b.values)
    return interest / b.shape.groups


def exact_attention_at(b: Batch) -> Tensor:
    """Return softmax attention `[B, Q, D]` over the behaviours before each cut."""
    scores = torch.matmul(b.queries * b.shape.size**-0.5, b.values.mT)
    weights = scores.masked_fill(~_seen(b), -torch.inf).softmax(-1)
    return torch.matmul(weights, b.values)


def relative_error(result: Tensor, definition: Tensor) -> float:
    """Return RMS(error) / RMS(definition), infinity where the result is not finite."""
    error, size = result.detach().double() - definition.detach(), definition.detach()
    relative = float((error.square().mean() / size.square().mean()).sqrt())
    return relative if relative == relative else torch.inf


def _seen(b: Batch) -> Tensor:
    return _position(b).lt(b.cuts[..., None])


def _position(b: Batch) -> Tensor:
    return torch.arange(b.shape.length, device=b.cuts.device)


def _unit(rows: Tensor) -> Tensor:
    square = rows.square().sum(-1, keepdim=True)
    return rows * torch.where(square > 0, square, torch.inf).rsqrt()
