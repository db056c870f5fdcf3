"""How a click model trains on a GPU: in bfloat16 where that is safe, and as one compiled graph."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from hashtab.models.ctr.click_model import ClickModel

# Batches of one user, one sample or no behaviours each make another graph; past the limit, torch's
# is 8, a training would end.
_GRAPHS = 32


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return bfloat16 autocast for training on a GPU, and nothing on a CPU.

    Embeddings reach the history encoder in bfloat16; hash products and sums stay float32. Not for
    evaluation: there a model computes in float32, as it is served.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compiled(model: ClickModel, backend: str | Callable[..., Any] = "inductor") -> nn.Module:
    """Return `model` as one graph for batches of all sizes, with the same parameters.

    A model whose history encoder cannot be one graph is returned as it is. Graphs of this process
    are dropped: those of earlier models would count towards torch's limit.

    Args:
        model: to compile, which happens at the first batch.
        backend: of `torch.compile`.
    """
    if not model.encoder.one_graph:
        return model
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    graph = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    return cast(nn.Module, graph)
