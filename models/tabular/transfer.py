"""Weights of one table's networks carried over to another table's, column by column."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hashtab.models.tabular.embedding import CategoryTokens
from hashtab.models.tabular.encoding import NumericEncoder
from hashtab.models.tabular.network import TabNSANetwork
from hashtab.models.tabular.statistics import TargetStatistics
from hashtab.models.tabular.table import FIRST_CODE, Table

Side = tuple[Table, TargetStatistics]


@dataclass(frozen=True)
class Shared:
    """Positions of what two tables share: in the new one, and in the old one.

    Attributes:
        numeric: among the columns of numbers, statistics of categories the last of them.
        tokens: among all tokens, numbers first; columns, or each category if `by_category`.
        categories: among the slots of all categories.
    """

    numeric: tuple[Tensor, Tensor]
    tokens: tuple[Tensor, Tensor]
    categories: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, new: Side, old: Side, by_category: bool) -> "Shared":
        """Match columns by name and kind, and their categories by text."""
        return cls(
            _matches(_numbers(*new), _numbers(*old)),
            _matches(_tokens(*new, by_category), _tokens(*old, by_category)),
            _matches(_slots(new[0]), _slots(old[0])),
        )


def _names(table: Table, positions: tuple[int, ...]) -> list[str]:
    return [table.names[i] for i in positions]


def _numbers(table: Table, statistics: TargetStatistics) -> list[tuple[str, str]]:
    names = _names(table, table.categorical)
    numbers = [("number", name) for name in _names(table, table.numeric)]
    return numbers + [("statistic", names[j]) for j in statistics.columns]


def _tokens(table: Table, statistics: TargetStatistics, by_category: bool) -> list[tuple[Any, ...]]:
    numbers = _numbers(table, statistics)
    if by_category:
        return numbers + [("category", *slot) for slot in _slots(table)]
    return numbers + [("category", name) for name in _names(table, table.categorical)]


def _slots(table: Table) -> list[tuple[str, int | str]]:
    columns = zip(_names(table, table.categorical), table.categories, strict=True)
    return [(name, slot) for name, known in columns for slot in (*range(FIRST_CODE), *known)]


def _matches(new: list[Any], old: list[Any]) -> tuple[Tensor, Tensor]:
    place = {key: i for i, key in enumerate(old)}
    pairs = [(i, place[key]) for i, key in enumerate(new) if key in place]
    return torch.tensor([i for i, _ in pairs]).long(), torch.tensor([j for _, j in pairs]).long()


def carry_encoder(new: NumericEncoder, old: NumericEncoder, shared: Shared) -> None:
    """Encode shared columns as before, so that their weights keep their meaning."""
    into, source = shared.numeric
    for buffer, before in zip(new.buffers(), old.buffers(), strict=True):
        buffer[into] = before[source]


def carry_network(new: TabNSANetwork, old: TabNSANetwork, shared: Shared) -> None:
    """Copy all weights that do not belong to columns which only one table has.

    The head is copied if both answer with as many outputs. Both networks have the same settings.

    Raises:
        ValueError: `readout="auto"` means one thing for the one table and another for the other.
    """
    if new.readout.flattens != old.readout.flattens:
        how = {True: "reads tokens one by one", False: "reads the mean of tokens"}
        raise ValueError(
            f'warm_start_from {how[old.readout.flattens]} where this table, with readout="auto", '
            f'{how[new.readout.flattens]}: set readout="mean" in both estimators'
        )
    before = dict(old.named_parameters())
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            source = _networks(before[name], len(parameter))
            axis, positions = _axis_of_columns(new, name, shared)
            if axis is None:
                if parameter.shape == source.shape:
                    parameter.copy_(source)
                continue
            into, origin = positions
            parameter.index_copy_(axis, into, source.index_select(axis, origin))


def freeze_backbone(network: TabNSANetwork) -> None:
    """Train tokens and head only."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(("tokens.", "head")))


def _networks(values: Tensor, count: int) -> Tensor:
    return values[torch.arange(count) % len(values)]


def _axis_of_columns(
    network: TabNSANetwork, name: str, shared: Shared
) -> tuple[int | None, tuple[Tensor, Tensor]]:
    """Return along which dimension a parameter has a part for each column, and whose parts."""
    module: nn.Module = network.get_submodule(name.rpartition(".")[0])
    if isinstance(module, CategoryTokens):
        return 1, shared.categories
    if name.startswith("tokens.numbers."):
        return 1, shared.numeric
    if name in ("tokens.identity", "adapter"):
        return 1, shared.tokens
    if name.endswith("columns_in.weight"):
        return 2, shared.tokens
    if ".columns_out." in name:
        return 1, shared.tokens
    if name == "readout.linear.weight" and network.readout.flattens:
        return 1, _features(shared.tokens, network.readout.norm.weight.shape[-1])
    return None, shared.tokens


def _features(tokens: tuple[Tensor, Tensor], width: int) -> tuple[Tensor, Tensor]:
    into, origin = ((part[:, None] * width + torch.arange(width)).flatten() for part in tokens)
    return into, origin
