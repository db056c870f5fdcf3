"""A click model in the parts that serving runs: behaviours to table increments, and scoring.

Scoring comes whole and in halves: what is of an item alone, and the rest. All take one dict of
tensors, whose names become those of an exported graph's inputs.
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
        return _scores(self.model, inputs, *_items(self.model, inputs))


class ServedItems(nn.Module):
    """The half of `ServedScorer` that is of an item alone, whoever the user is.

    Args:
        model: as `ServedScorer`'s.
    """

    def __init__(self, model: ClickModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return what `ServedOnline` reads of N items.

        Args:
            inputs: `candidate.<name>` -> `[N]`, int32 ids or float32.

        Returns:
            Vectors `[N, D]` float32, and codes `[N, G]` int32 where the encoder looks them up.
        """
        vectors, codes = _items(self.model, inputs)
        looks_up = self.model.encoder.looks_up
        return (vectors, codes.to(torch.int32)) if looks_up else (vectors,)


class ServedOnline(nn.Module):
    """The other half of `ServedScorer`: the same operations in the same order, so the same bits.

    Args:
        model: as `ServedScorer`'s.
    """

    def __init__(self, model: ClickModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Score C items for each of U users.

        Args:
            inputs: as of `ServedScorer`, but for `item.vector` `[U, C, D]` float32 and `item.codes`
                `[U, C, G]` int32 in place of `candidate.<name>`.

        Returns:
            Probabilities `[U, C]` float32.
        """
        vectors = inputs["item.vector"]
        return _scores(self.model, inputs, vectors, inputs.get("item.codes", vectors.new_zeros(0)))


def _items(model: ClickModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return vectors `[..., D]` and codes `[..., G]`, which are empty if no one reads them."""
    vectors = _embed(model.objects, inputs, "candidate", model.features.candidate)
    looks_up = model.encoder.looks_up
    return vectors, model.encoder.codes(vectors) if looks_up else vectors.new_zeros(0)


def _scores(
    model: ClickModel, inputs: dict[str, Tensor], candidates: Tensor, codes: Tensor
) -> Tensor:
    features = model.features
    interest = model.encoder.serve(_users(model, inputs, candidates, codes))
    context = counters = None
    if features.context:
        context = _embed(model.context, inputs, "context", features.context).flatten(0, 1)
    if model.settings.counters:
        counters = inputs["counters"].flatten(0, 1)
    # Rows in place of users: runtimes fuse a layer of two dimensions with its bias.
    rows = candidates.flatten(0, 1), interest.flatten(0, 1)
    logits = model.logits(*rows, context, counters)
    return logits.view(candidates.shape[:2]).sigmoid()


def _users(
    model: ClickModel, inputs: dict[str, Tensor], candidates: Tensor, codes: Tensor
) -> ServedUsers:
    """Join what is kept; what the encoder does not read is empty."""
    empty = candidates.new_zeros(0)
    recent = empty
    if model.encoder.recent:
        recent = _embed(model.objects, inputs, "recent", model.features.behaviour)
    return ServedUsers(
        candidates=candidates,
        codes=codes,
        table=inputs["table"].to(candidates.dtype) if "table" in inputs else empty,
        behaviours=inputs.get("behaviours", empty),
        recent=recent,
        recent_lengths=inputs.get("recent_lengths", empty),
    )


def _embed(
    embedding: nn.Module, inputs: dict[str, Tensor], role: str, features: tuple[Feature, ...]
) -> Tensor:
    """Embed the columns `<role>.<name>` of any shape `[...]` to `[..., D]`."""
    columns = {feature.name: inputs[f"{role}.{feature.name}"] for feature in features}
    embedded: Tensor = embedding(columns, features)
    return embedded
