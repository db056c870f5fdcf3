"""What the target says of a category: a number beside the category's own token."""

from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hashtab.models.tabular.table import FIRST_CODE

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]

# Categories from which a column has statistics: the tokens of fewer learn from many rows each.
MANY = 8
_PRIOR_ROWS = 1.0
_PARTS = 8


class TargetStatistics(nn.Module):
    """The mean target of each category, drawn to the mean of all by one row of it.

    (sum of y + mean) / (rows + 1), the target statistics of CatBoost (arXiv 1706.09516, section
    3.2, equation 1 with a = 1), less the mean. Categories that were never seen have 0.

    Args:
        columns: positions of the columns that have statistics, among those of categories.
        levels: number of categories of each column of categories.
    """

    columns: Tensor
    first: Tensor
    values: Tensor

    def __init__(self, columns: tuple[int, ...], levels: tuple[int, ...]) -> None:
        super().__init__()
        slots = [levels[j] + FIRST_CODE for j in columns]
        starts = [sum(slots[:i]) for i in range(len(slots))]
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64))
        self.register_buffer("first", torch.tensor(starts, dtype=torch.int64))
        self.register_buffer("values", torch.zeros(sum(slots), dtype=torch.float64))

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """Return the statistics of a `state_dict`."""
        statistics = cls((), ())
        statistics.columns, statistics.first, statistics.values = (
            state[name] for name in ("columns", "first", "values")
        )
        return statistics

    def fit(self, codes: Codes, target: Array, weight: Array) -> Self:
        """Learn from codes `[N, Fc]`, targets `[N]` and weights `[N]`; return itself."""
        mean = np.average(target, weights=weight)
        slots = self._slots(torch.from_numpy(codes)).numpy()
        sums, rows = np.zeros((2, len(self.values)))
        for column in slots.T:
            sums += np.bincount(column, weight * (target - mean), len(sums))
            rows += np.bincount(column, weight, len(rows))
        self.values = torch.from_numpy(sums / (rows + _PRIOR_ROWS))
        return self

    def forward(self, codes: Tensor) -> Tensor:
        """Return `[N, J]` float64 of codes `[N, Fc]`."""
        return self.values[self._slots(codes)]

    def of_others(
        self, codes: Codes, target: Array, weight: Array, train: Rows, random: np.random.Generator
    ) -> Tensor:
        """Return `[N, J]` as a network that trains on some rows reads them; be fitted on those.

        The rows that it trains on are dealt into parts, and each has the statistics of the other
        parts: its own target would give away what is to be learnt. All other rows, which the
        network is validated on, have the statistics of the rows trained on, as new ones will.

        Args:
            codes: `[N, Fc]`.
            target: `[N]`.
            weight: `[N]`, positive.
            train: indices of the rows that the network trains on.
            random: deals the parts.
        """
        own = random.permutation(len(train)) % _PARTS
        rest = []
        for part in range(_PARTS):
            others = train[own != part]
            rest.append(self.fit(codes[others], target[others], weight[others]).values)
        self.fit(codes[train], target[train], weight[train])
        found: Tensor = self(torch.from_numpy(codes))
        slots = self._slots(torch.from_numpy(codes[train]))
        found[train] = torch.stack(rest)[torch.from_numpy(own)[:, None], slots]
        return found

    def _slots(self, codes: Tensor) -> Tensor:
        return codes[:, self.columns] + self.first
