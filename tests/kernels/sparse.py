"""Random arguments of native sparse attention, and one query after the other as its oracle."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from hashtab.kernels import nsa


@dataclass(frozen=True)
class Sparse:
    """Arguments of `native_sparse_attention`; of a pair, the second belongs to the window."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    block: int = 8
    stride: int = 4
    select_block: int = 8
    n_select: int = 2
    window: int = 5
    causal: bool = False
    lengths: Tensor | None = None

    @classmethod
    def random(
        cls,
        tokens: int,
        *,
        batch: int = 2,
        group: int = 2,
        kv_heads: int = 2,
        size: int = 4,
        value_size: int = 4,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        **sizes: Any,
    ) -> Self:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(batch, tokens, *shape, dtype=torch.float64, generator=generator)
            return drawn.to(dtype)

        heads = group * kv_heads
        return cls(
            q=normal(heads, size),
            k=normal(kv_heads, size),
            v=normal(kv_heads, value_size),
            gates=normal(heads, 3).sigmoid(),
            **sizes,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.gates

    @property
    def sizes(self) -> dict[str, Any]:
        names = ("block", "stride", "select_block", "n_select", "window", "causal", "lengths")
        return {name: getattr(self, name) for name in names}

    def but(self, **changed: Any) -> Self:
        return replace(self, **changed)

    def attend(self, **more: Any) -> Tensor:
        arguments: dict[str, Any] = {"gates": self.gates} | self.sizes | more
        out: Tensor = nsa.native_sparse_attention(self.q, self.k, self.v, **arguments)
        return out

    def selected(self, **more: Any) -> Tensor:
        sizes = self.sizes | more
        del sizes["window"]
        return nsa.selected_blocks(self.q, self.k, **sizes)

    def with_gradients(self, **more: Any) -> tuple[Tensor, ...]:
        """The result, and the gradients of q, k, v and gates."""
        q, k, v, gates = (x.clone().requires_grad_() for x in self.tensors)
        out = self.but(q=q, k=k, v=v, gates=gates).attend(**more)
        upstream = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos()
        return out.detach(), *torch.autograd.grad(out, (q, k, v, gates), upstream.to(out.dtype))


def by_loop(s: Sparse) -> tuple[Tensor, list[list[list[list[int]]]]]:
    """The result and the selected blocks, one query after the other, by the paper's words."""
    batch, tokens, heads, _ = s.q.shape
    kv_heads = s.k.shape[2]
    group = heads // kv_heads
    out = torch.zeros(batch, tokens, heads, s.v.shape[3], dtype=torch.float64)
    selected: list[list[list[list[int]]]] = []
    for b in range(batch):
        length = tokens if s.lengths is None else int(s.lengths[b])
        selected.append([[[] for _ in range(kv_heads)] for _ in range(tokens)])
        blocks = [] if length == 0 else nsa.blocks(length, s.block, s.stride).tolist()
        for t in range(length):
            for h in range(kv_heads):
                own = slice(h * group, (h + 1) * group)
                q, gates = s.q[b, t, own].double(), s.gates[b, t, own].double()
                k, v = s.k[b, :length, h].double(), s.v[b, :length, h].double()
                o, selected[b][t][h] = one_query(s, t, blocks, q, k, v, gates)
                out[b, t, own] = o
    return out, selected


def one_query(
    s: Sparse, t: int, blocks: list[list[int]], q: Tensor, k: Tensor, v: Tensor, gates: Tensor
) -> tuple[Tensor, list[int]]:
    def softmax(keys: Tensor) -> Tensor:
        weights: Tensor = (q @ keys.T / q.shape[1] ** 0.5).softmax(1)
        return weights

    seen = [i for i in range(len(blocks)) if not s.causal or i * s.stride + s.block - 1 <= t]
    branches = [torch.zeros(q.shape[0], v.shape[1], dtype=torch.float64)]
    weights = torch.zeros(q.shape[0], 0)
    if seen:
        weights = softmax(torch.stack([k[slice(*blocks[i])].mean(0) for i in seen]))
        branches = [weights @ torch.stack([v[slice(*blocks[i])].mean(0) for i in seen])]
    end = t + 1 if s.causal else len(k)
    choices = range(-(-end // s.select_block))
    share = dict.fromkeys(choices, 0.0)
    for column, i in enumerate(seen):
        for position in range(i * s.stride, i * s.stride + s.block):
            if (j := position // s.select_block) in share:
                share[j] += float(weights[:, column].sum()) / s.stride
    own, halves = t // s.select_block, {j: float(torch.tensor(share[j]).half()) for j in choices}
    ranked = sorted(choices, key=lambda j: (j != own, -halves[j], j))[: s.n_select]
    for positions in (
        [i for i in range(end) if i // s.select_block in ranked],
        list(range(max(0, t - s.window + 1), min(end, t + s.window))),
    ):
        branches.append(softmax(k[positions]) @ v[positions])
    return (torch.stack(branches, -1) * gates[:, None]).sum(-1), ranked
