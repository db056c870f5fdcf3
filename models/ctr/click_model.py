"""The click model: embeddings, an interchangeable history encoder and a small network on top."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hashtab.models.ctr.batch import FeatureSpec, TensorBatch
from hashtab.models.ctr.embedding import FeatureEmbedding
from hashtab.models.ctr.encoders import ENCODERS
from hashtab.models.ctr.encoders.base import EmbeddedUsers
from hashtab.models.ctr.settings import ClickModelSettings


class ClickModel(nn.Module):
    """Score each candidate against the history before its request.

    The shape of the data's way, for a batch of whole users:

        behaviours {name: [N]} -> embedding [N, D] -.
                                                    encoder -> interest [Q, I] -.
        candidates {name: [Q]} -> embedding [Q, D] -'                           |
                                `- candidate, candidate * interest -head -> output -> logit [Q]
        context {name: [Q]} -> embedding [Q, D], counters [Q, K] ---------------'

    Args:
        features: what the data holds.
        settings: what the model is made of.

    Raises:
        ValueError: if behaviours or candidates have no features, or the settings ask for counters
            that the data does not have.
    """

    def __init__(self, features: FeatureSpec, settings: ClickModelSettings) -> None:
        super().__init__()
        if settings.counters and not features.counters:
            raise ValueError("counters=True, but the data's schema declares no counters")
        if not features.behaviour or not features.candidate:
            raise ValueError(f"behaviours and candidates need one feature at least, got {features}")
        self.features = features
        self.settings = settings
        size = settings.embedding_size
        self.objects = FeatureEmbedding(
            (*features.behaviour, *features.candidate), size, settings.initial_std
        )
        self.context = FeatureEmbedding(features.context, size, settings.initial_std)
        self.encoder = ENCODERS[settings.encoder](settings)
        n_inputs = size + bool(features.context) * size + 2 * self.encoder.output_size
        n_inputs += settings.counters * len(features.counters)
        self.head = _mlp(n_inputs, settings.hidden, settings.dropout)
        self.output = nn.Linear((n_inputs, *settings.hidden)[-1], 1)

    def forward(self, batch: TensorBatch) -> Tensor:
        """Return one logit a sample, `[Q]` float32.

        Raises:
            ValueError: as `embed`.
        """
        users = self.embed(batch)
        context = None
        if self.features.context:
            context = self.context(batch.context, self.features.context)
        return self.logits(users.candidates, self.encoder(users), context, batch.counters)

    def logits(
        self, candidates: Tensor, interest: Tensor, context: Tensor | None, counters: Tensor | None
    ) -> Tensor:
        """Return `[...]` float32 from candidates and context `[..., D]`, interest `[..., I]`.

        Counters are `[..., K]`, and not read by a model without them.
        """
        size = candidates.shape[-1]
        parts = interest.unflatten(-1, (interest.shape[-1] // size, size))
        inputs = [candidates, interest, (parts * candidates.unsqueeze(-2)).flatten(-2)]
        if context is not None:
            inputs.append(context)
        if self.settings.counters and counters is not None:
            inputs.append(counters.to(candidates.dtype))
        hidden: Tensor = self.head(torch.cat(inputs, dim=-1))
        # Candidates that differ past the third digit would tie in bfloat16.
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = self.output(hidden.to(self.output.weight.dtype))
        return logits[..., 0].float()

    def embed(self, batch: TensorBatch) -> EmbeddedUsers:
        """Embed behaviours and candidates: what the history encoder reads.

        A batch on the CPU is checked, outside of graphs; one on a GPU was when it was brought.

        Raises:
            ValueError: if the batch lacks a column, or offsets and cuts do not fit its rows.
        """
        users = EmbeddedUsers(
            behaviours=self.objects(batch.behaviours, self.features.behaviour),
            history_offsets=batch.history_offsets,
            candidates=self.objects(batch.candidates, self.features.candidate),
            sample_offsets=batch.sample_offsets,
            cuts=batch.cuts,
        )
        if batch.cuts.is_cpu and not torch.compiler.is_compiling():
            batch.check()
        return users

    def parameter_groups(
        self, learning_rate: float, embedding_learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Return the optimiser's groups: embeddings with a rate of their own and no decay."""
        embeddings = [*self.objects.parameters(), *self.context.parameters()]
        rest = [self.encoder, self.head, self.output]
        return [
            {"params": embeddings, "lr": embedding_learning_rate, "weight_decay": 0.0},
            {
                "params": [p for part in rest for p in part.parameters()],
                "lr": learning_rate,
                "weight_decay": weight_decay,
            },
        ]


def _mlp(n_inputs: int, hidden: tuple[int, ...], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise((n_inputs, *hidden)):
        layers += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)
