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

    def forward(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Embed objects given by their feature columns, each `[N]`; returns `[N, D]`."""
        parts = [self._embed(name, column) for name, column in columns.items()]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _embed(self, name: str, column: Tensor) -> Tensor:
        if name in self._table_of:
            embedded: Tensor = self.tables[self._table_of[name]](column)
            return embedded
        scaled: Tensor = column[:, None] * self.directions[self._direction_of[name]]
        return scaled


def _table(n_ids: int, size: int, initial_std: float) -> nn.Embedding:
    table = nn.Embedding(n_ids, size, padding_idx=0)
    with torch.no_grad():
        table.weight.normal_(std=initial_std)
        table.weight[0].zero_()
    return table


def _unique(features: Iterable[Feature]) -> list[Feature]:
    by_name: dict[str, Feature] = {}
    for feature in features:
        if by_name.setdefault(feature.name, feature) != feature:
            raise ValueError(
                f"feature {feature.name!r} is declared twice: {by_name[feature.name]}, {feature}"
            )
    return list(by_name.values())
