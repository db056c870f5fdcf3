"""Embeddings of named features: one table a name, shared by behaviours and candidates."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hashtab.models.ctr.batch import Feature


class FeatureEmbedding(nn.Module):
    """Embed an object with several features as the sum of its features' vectors.

    A sum keeps behaviours and candidates in one space, whatever number of features each has, so
    that likeness of two items is likeness of their features. A categorical feature looks its
    vector up; id 0 (padding) is the zero vector, id 1 (unknown) is learned like any other. A
    numeric feature scales a learned vector. Tables start from N(0, `initial_std`).

    Args:
        features: all features to embed; those of one name must agree in kind and size.
        size: length D of the vectors.
        initial_std: standard deviation of the initial tables.

    Raises:
        ValueError: if two features of one name differ in kind or size.
    """

    def __init__(self, features: Iterable[Feature], size: int, initial_std: float) -> None:
        super().__init__()
        self.size = size
        self.tables = nn.ModuleDict()
        self.directions = nn.ParameterDict()
        for feature in _unique(features):
            if feature.kind == "categorical":
                table = nn.Embedding(feature.size, size, padding_idx=0)
                nn.init.normal_(table.weight, std=initial_std)
                with torch.no_grad():
                    table.weight[0].zero_()
                self.tables[feature.name] = table
            else:
                self.directions[feature.name] = nn.Parameter(torch.randn(size) * initial_std)

    def forward(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Embed objects given by their feature columns, each `[N]`; returns `[N, D]`."""
        parts = [self._embed(name, column) for name, column in columns.items()]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _embed(self, name: str, column: Tensor) -> Tensor:
        if name in self.tables:
            embedded: Tensor = self.tables[name](column)
            return embedded
        return column[:, None] * self.directions[name]


def _unique(features: Iterable[Feature]) -> list[Feature]:
    by_name: dict[str, Feature] = {}
    for feature in features:
        if by_name.setdefault(feature.name, feature) != feature:
            raise ValueError(
                f"feature {feature.name!r} is declared twice: {by_name[feature.name]}, {feature}"
            )
    return list(by_name.values())
