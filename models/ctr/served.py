"""A click model in the two parts that serving runs: behaviours to table increments, and scoring.

Both take one dict of tensors, whose names become those of an exported graph's inputs.
"""

import torch
from torch import Tensor, nn

from hashtab.models.ctr.batch import Feature
from hashtab.models.ctr.click_model import ClickModel
from hashtab.models.ctr.encoders.base import TABLE_SCALE, ServedUsers

LARGEST_COMPONENT = (1 << 24) - 1  # 256 less one unit; integers up to here are exact in float32


class ServedEncoder(nn.Module):
    """What each behaviour adds to its user's table, in int32 fixed point of 2^-16.

    Integers make a table independent of the order and the grouping of its behaviours. A component
    of 256 or more, or that is no number, becomes `LARGEST_COMPONENT`, which tells the caller. The
    sums of one call are int32: those of 128 behaviours are exact whatever they are, those of L
    behaviours where no component reaches `2**31 / L`.

    Args:
        model: whose history encoder keeps a table.
    """

    def __init__(self, model: ClickModel) -> None:
        super().__init__()
        self.objects = model.objects
        self.encoder = model.encoder
        self.features = model.features.behaviour

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the behaviours of U users, L each; shorter ones are padded with zeros.

        Args:
            inputs: `behaviour.<name>` -> `[U, L]`, int32 ids or float32.

        Returns:
            Increments `[U, G, buckets, D]`, codes `[U, L, G]` and vectors `[U, L, D]`, all int32.
        """
        embedded = _embed(self.objects, inputs, "behaviour", self.features)
        users, length, size = embedded.shape
        groups, buckets = self.encoder.groups, self.encoder.buckets
        codes = self.encoder.codes(embedded)
        fixed = (embedded * TABLE_SCALE).round()
        # Not a clamp: a NaN would pass it and become whatever integer the processor likes.
        held = torch.where(fixed.abs() < LARGEST_COMPONENT, fixed, LARGEST_COMPONENT)
        vectors = held.to(torch.int32)
        first = torch.arange(users * groups, device=codes.device).view(users, 1, groups) * buckets
        rows = vectors[:, :, None].expand(users, length, groups, size).reshape(-1, size)
        table = vectors.new_zeros(users * groups * buckets, size)
        table = table.index_add(0, (codes + first).flatten(), rows)
        return table.view(users, groups, buckets, size), codes.to(torch.int32), vectors


class ServedScorer(nn.Module):
    """Scores of each user's candidates, from what is kept of the user; nothing of it is learned.

    Args:
        model: trained; its history encoder must not read all behaviours one by one.
    """

    def __init__(self, model: ClickModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Score C candidates of each of U users.

        Args:
            inputs: by name, those that the model reads: `table` `[U, G, buckets, D]` int32 in fixed
                point of 2^-16, `behaviours` `[U]` int64, how many it holds, `recent.<name>`
                `[U, R]`, padded with zeros at the end, `recent_lengths` `[U]` int64,
                `candidate.<name>` `[U, C]`, `context.<name>` `[U, C]`, `counters` `[U, C, K]`
                float32, log(1 + count).

        Returns:
            Probabilities `[U, C]` float32.
        """
        return self.score(inputs, *self.items(inputs))

    def items(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what is of candidates alone, whoever the user is.

        Returns:
            Vectors `[U, C, D]` and, if the encoder looks them up, buckets `[U, C, G]` int32, as
            rows of a user's table `[G * buckets, D]`.
        """
        encoder = self.model.encoder
        features = self.model.features.candidate
        vectors = _embed(self.model.objects, inputs, "candidate", features)
        if not encoder.looks_up:
            return vectors, vectors.new_zeros(0)
        first_G = torch.arange(encoder.groups, device=vectors.device) * encoder.buckets
        return vectors, (encoder.codes(vectors) + first_G).to(torch.int32)

    def score(self, inputs: dict[str, Tensor], candidates: Tensor, buckets: Tensor) -> Tensor:
        """Return the probabilities `[U, C]` of candidates as `items` returns them."""
        model = self.model
        features = model.features
        interest = model.encoder.serve(self._users(inputs, candidates, buckets))
        context = counters = None
        if features.context:
            context = _embed(model.context, inputs, "context", features.context).flatten(0, 1)
        if model.settings.counters:
            counters = inputs["counters"].flatten(0, 1)
        # Rows in place of users: runtimes fuse a layer of two dimensions with its bias.
        rows = candidates.flatten(0, 1), interest.flatten(0, 1)
        logits = model.logits(*rows, context, counters)
        return logits.view(candidates.shape[:2]).sigmoid()

    def _users(self, inputs: dict[str, Tensor], candidates: Tensor, buckets: Tensor) -> ServedUsers:
        """Join what is kept; what the encoder does not read is empty."""
        empty = candidates.new_zeros(0)
        recent = empty
        if self.model.encoder.recent:
            recent = _embed(self.model.objects, inputs, "recent", self.model.features.behaviour)
        return ServedUsers(
            candidates=candidates,
            buckets=buckets,
            table=inputs["table"].to(candidates.dtype) if "table" in inputs else empty,
            behaviours=inputs.get("behaviours", empty),
            recent=recent,
            recent_lengths=inputs.get("recent_lengths", empty),
        )


class ServedScorerWithItems(ServedScorer):
    """A scorer that shows what it computes of candidates alone, so that it can be cut there."""

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return the scores, vectors and, if the encoder looks them up, buckets."""
        vectors, buckets = self.items(inputs)
        scores = self.score(inputs, vectors, buckets)
        return (scores, vectors, buckets) if self.model.encoder.looks_up else (scores, vectors)


def _embed(
    embedding: nn.Module, inputs: dict[str, Tensor], role: str, features: tuple[Feature, ...]
) -> Tensor:
    """Embed the columns `<role>.<name>` of any shape `[...]` to `[..., D]`."""
    columns = {feature.name: inputs[f"{role}.{feature.name}"] for feature in features}
    embedded: Tensor = embedding(columns, features)
    return embedded
