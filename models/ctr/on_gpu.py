"""How a click model trains on a GPU: in bfloat16 where that is safe, and as one compiled graph."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hashtab.models.ctr.batch import TensorBatch
from hashtab.models.ctr.click_model import ClickModel


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return bfloat16 autocast for training on a GPU, and nothing on a CPU.

    Embeddings reach the history encoder in bfloat16; hash products and sums stay float32. Not for
    evaluation: there a model computes in float32, as it is served.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compiled(model: ClickModel, backend: str | Callable[..., Any] = "inductor") -> nn.Module:
    """Return `model` as one graph for batches of all sizes, with the same parameters.

    A model whose history encoder cannot be one graph is returned as it is. Graphs of this process
    are dropped: those of earlier models would count towards torch's limit, and past it a training
    would end.

    Args:
        model: to compile, which happens at the first batch.
        backend: of `torch.compile`.
    """
    if not model.encoder.one_graph:
        return model
    torch.compiler.reset()
    return _OneGraph(model, backend)


class _OneGraph(nn.Module):
    """A compiled model. Sizes of 0 and 1, for which torch would compile it anew, are avoided.

    That would take seconds each time such a batch comes first, in the midst of a training.
    """

    def __init__(self, model: ClickModel, backend: str | Callable[..., Any]) -> None:
        super().__init__()
        graph = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        self.graph = cast(nn.Module, graph)

    def forward(self, batch: TensorBatch) -> Tensor:
        samples = len(batch.cuts)
        columns = (*batch.behaviours.values(), batch.sample_offsets[1:], batch.cuts)
        if min(map(len, columns)) > 1:
            return cast(Tensor, self.graph(batch))
        return cast(Tensor, self.graph(batch.with_spare_users())[:samples])
