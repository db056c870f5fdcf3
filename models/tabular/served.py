"""A fitted TabNSA as one module from raw numbers and category codes to predictions."""

import copy

import torch
from torch import Tensor, nn

from hashtab.models.tabular.blocks import ColumnAttention, TabMixer
from hashtab.models.tabular.embedding import Encoded, NumericTokens
from hashtab.models.tabular.encoding import NumericEncoder
from hashtab.models.tabular.losses import Loss
from hashtab.models.tabular.network import TabNSANetwork
from hashtab.models.tabular.stacked import LayerNorm, Linear
from hashtab.models.tabular.statistics import TargetStatistics


class ServedTable(nn.Module):
    """Encode, run all networks, average: nothing of it depends on the values, so it exports.

    Args:
        encoder: of the numbers, statistics of categories the last of them.
        statistics: of the categories.
        network: fitted networks.
        loss: says what answers mean.
        scale: of the target, 1 for classes.
        shift: of the target, 0 for classes.
    """

    def __init__(
        self,
        encoder: NumericEncoder,
        statistics: TargetStatistics,
        network: TabNSANetwork,
        loss: Loss,
        scale: float,
        shift: float,
    ) -> None:
        super().__init__()
        self.encoder, self.network, self.loss = encoder, network, loss
        self.statistics = statistics
        self.scale, self.shift = scale, shift

    def average(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """Return predictions `[N, P]` float64 of numbers `[N, Fn]` float64 and codes `[N, Fc]`."""
        if len(self.statistics.columns):
            numbers = torch.cat([numbers, self.statistics(codes)], 1)
        parts = (*self.encoder(numbers), codes)
        answers = self.network(Encoded(*(part.T[None] for part in parts)))
        predictions = self.loss.predict(answers.double()).flatten(0, 1)
        # One after another: in which order `mean` adds depends on the number of rows.
        mean = sum(predictions.unbind()[1:], predictions[0]) / len(predictions)
        return mean * self.scale + self.shift

    def forward(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """Return float32 probabilities `[N, K]`, means `[N]` or quantiles `[N, Q]`."""
        predictions = self.average(numbers, codes).float()
        return predictions[:, 0] if predictions.shape[1] == 1 else predictions

    def for_export(self) -> "ServedTable":
        """Return a copy with operators in their plain definition, which exports."""
        plain = copy.deepcopy(self)
        for module in plain.modules():
            if isinstance(module, ColumnAttention | LayerNorm | Linear | NumericTokens | TabMixer):
                module.impl = "reference"
        return plain
