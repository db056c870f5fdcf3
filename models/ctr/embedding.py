"""Embeddings of named features: one table a name, shared by behaviours and candidates."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hashtab.models.ctr.batch import Feature


class FeatureEmbedding(nn.Module):
    """Embed an object with several features as the sum of its features' vectors.

    A sum keeps behaviours and candidates in one space, whatever number of features each has, so
    that likeness of two items is likeness of their features. A categorical feature looks its
    vector up, a numeric one scales a learned vector; both start from N(0, `initial_std`). Id 0
    (padding) is the zero vector. So is id 1 (unknown) until training meets it: an item that is new
    after training then says what its other features say, and no noise.

    Tables are kept in the order of the features' names, so that the state dict does not depend on
    the order of declaration.

    Args:
        features: all features to embed; those of one name must agree in kind and size.
        size: length D of the vectors.
        initial_std: standard deviation of the initial tables.

    Raises:
        ValueError: if two features of one name differ in kind or size.
    """

    def __init__(self, features: Iterable[Feature], size: int, initial_std: float) -> None:
        super().__init__()
        unique = _unique(features)
        # Lists and not dicts of modules: a feature may have any name, "type" and "a.b" included.
        self.tables = nn.ModuleList()
        self.directions = nn.ParameterList()
        self._table_of: dict[str, int] = {}
        self._direction_of: dict[str, int] = {}
        for feature in unique:
            if feature.kind == "categorical":
                self._table_of[feature.name] = len(self.tables)
                self.tables.append(_table(feature.size, size, initial_std))
            else:
                self._direction_of[feature.name] = len(self.directions)
                self.directions.append(nn.Parameter(torch.randn(size) * initial_std))

    def forward(self, columns: Mapping[str, Tensor], features: Sequence[Feature]) -> Tensor:
        """Embed objects by their features.

        Args:
            columns: feature name -> `[...]`, all of one shape.
            features: which of them the objects have, at least one; other columns are not read.

        Returns:
            `[..., D]`, in the dtype of the tables; under autocast the sum is rounded to its dtype,
            for kernels take rows as they come and would read float32 ones twice as long.

        Raises:
            ValueError: if a feature has no column.
        """
        missing = [feature.name for feature in features if feature.name not in columns]
        if missing:
            raise ValueError(f"the batch lacks the columns {missing}, it has {sorted(columns)}")
        first, *others = (self._embed(feature.name, columns[feature.name]) for feature in features)
        for other in others:
            first = first + other
        device = first.device.type
        # A device of shapes alone has no autocast and refuses the question.
        if device == "meta" or not torch.is_autocast_enabled(device):
            return first
        return first.to(torch.get_autocast_dtype(device))

    def _embed(self, name: str, column: Tensor) -> Tensor:
        if name in self._table_of:
            embedded: Tensor = self.tables[self._table_of[name]](column)
            return embedded
        direction = self.directions[self._direction_of[name]]
        scaled: Tensor = column[..., None].to(direction.dtype) * direction
        return scaled


def _table(n_ids: int, size: int, initial_std: float) -> nn.Embedding:
    table = nn.Embedding(n_ids, size, padding_idx=0)
    with torch.no_grad():
        table.weight.normal_(std=initial_std)
        table.weight[:2].zero_()
    return table


def _unique(features: Iterable[Feature]) -> list[Feature]:
    by_name: dict[str, Feature] = {}
    for feature in features:
        if by_name.setdefault(feature.name, feature) != feature:
            raise ValueError(
                f"feature {feature.name!r} is declared twice: {by_name[feature.name]}, {feature}"
            )
    return sorted(by_name.values(), key=lambda feature: feature.name)
