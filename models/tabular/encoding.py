"""Numbers as a network reads them: a bounded linear part, and a place among quantiles."""

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from hashtab.models.tabular.table import Numbers

_BOUND = 1e30  # infinities become numbers that arithmetic survives
_NEVER = 1e300  # a bin that no number reaches
_STEEP = 1e9  # scaled numbers beyond are all the same


class NumericEncoder(nn.Module):
    """Scale numbers by their spread, and locate them among quantiles.

    The linear part is robust: (x - median) / interquartile range, then z / sqrt(1 + (z / 3)^2)
    (RealMLP, arXiv 2407.04491, section 3), so that infinities are large numbers and no more. The
    place counts quantile bins below x, with the fraction of its own bin (Gorishniy et al.,
    arXiv 2203.05556, equation 1, summed over bins). Float64 inside: a date in seconds keeps its
    minutes.

    Args:
        numbers: `[N, F]`, what to fit on; NaN is missing.
        bins: quantile bins a column; fewer where a column has fewer values.
    """

    center: Tensor
    factor: Tensor
    left: Tensor
    width: Tensor

    def __init__(self, numbers: Numbers, bins: int) -> None:
        super().__init__()
        columns = numbers.shape[1]
        center, factor = np.zeros(columns), np.zeros(columns)
        left, width = np.full((columns, bins), _NEVER), np.ones((columns, bins))
        for f in range(columns):
            values = np.sort(numbers[:, f][~np.isnan(numbers[:, f])].clip(-_BOUND, _BOUND))
            if len(values) == 0 or values[0] == values[-1]:
                center[f] = values[0] if len(values) else 0.0
                continue
            center[f], factor[f] = _robust_scale(values)
            edges = _edges(values, bins)
            left[f, : len(edges) - 1], width[f, : len(edges) - 1] = edges[:-1], np.diff(edges)
        for name, value in (
            ("center", center),
            ("factor", factor),
            ("left", left),
            ("width", width),
        ):
            self.register_buffer(name, torch.from_numpy(value))

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "NumericEncoder":
        """Return the encoder of a `state_dict`."""
        columns, bins = state["left"].shape
        encoder = cls(np.zeros((1, columns)), bins)
        encoder.load_state_dict(state)
        return encoder

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode `[N, F]` float64 numbers.

        Returns:
            Linear part and place, both `[N, F]` float32, and what is missing, `[N, F]` bool. A
            missing number is encoded as the median.
        """
        missing = torch.isnan(numbers)
        x = torch.where(missing, self.center, numbers).clamp(-_BOUND, _BOUND)
        z = ((x - self.center) * self.factor).clamp(-_STEEP, _STEEP)
        z = z / torch.sqrt(1 + (z / 3) ** 2)
        exporting = torch.compiler.is_exporting()  # ONNX cannot search
        place = self._place_by_sum(x) if exporting else self._place_by_search(x)
        return z.float(), place.float(), missing

    def _place_by_sum(self, x: Tensor) -> Tensor:
        return ((x[..., None] - self.left) / self.width).clamp(0, 1).sum(-1)

    def _place_by_search(self, x: Tensor) -> Tensor:
        """Return the same, in memory and time that hardly know the number of bins."""
        by_column = x.T.contiguous()
        begun = torch.searchsorted(self.left, by_column, right=True)
        last = (begun - 1).clamp_min(0)
        share = (by_column - self.left.gather(1, last)) / self.width.gather(1, last)
        return (last + share.clamp(0, 1)).T


def _quantiles(values: Numbers, at: Numbers) -> Numbers:
    """Return quantiles of sorted values, between neighbours by proportion, as np.quantile does."""
    position = at * (len(values) - 1)
    below = position.astype(np.int64)
    above = np.minimum(below + 1, len(values) - 1)
    return values[below] + (position - below) * (values[above] - values[below])


def _edges(values: Numbers, bins: int) -> Numbers:
    """Return up to `bins + 1` edges of sorted values, all different.

    A value that many rows share takes several quantiles at once. So about as many quantiles are
    asked for as leave `bins + 1` that differ: a column that is mostly zero has its bins where it is
    not.
    """
    distinct = np.unique(values)
    if len(distinct) <= bins + 1:
        return distinct
    edges = np.unique(_quantiles(values, np.linspace(0, 1, bins + 1)))
    few, many = bins, len(values) - 1
    while len(edges) < bins + 1 and many - few > 1:
        middle = (few + many) // 2
        found = np.unique(_quantiles(values, np.linspace(0, 1, middle + 1)))
        if len(found) <= bins + 1:
            few, edges = middle, found
        else:
            many = middle
    return edges


def _robust_scale(values: Numbers) -> tuple[float, float]:
    """Return the median and one over the interquartile range, or over half the range."""
    low, median, high = _quantiles(values, np.array([0.25, 0.5, 0.75]))
    spread = high - low if high > low else (values[-1] - values[0]) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a spread too small to divide by
        factor = 1 / spread
    return float(median), float(factor) if np.isfinite(factor) else 0.0
