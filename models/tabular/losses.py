"""What a network learns to answer: class probabilities, a mean, or quantiles."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Loss(Protocol):
    """How the answers `[..., B, O]` of networks become predictions, and what those cost."""

    outputs: int

    def of_answers(self, answers: Tensor, target: Tensor) -> Tensor:
        """Return the loss `[..., B]` that training minimises, for targets `[..., B]`."""

    def predict(self, answers: Tensor) -> Tensor:
        """Return predictions `[..., B, P]` that may be averaged over networks."""

    def of_predictions(self, predictions: Tensor, target: Tensor) -> Tensor:
        """Return the loss `[..., B]` of averaged predictions, which chooses the best epoch."""

    def explained(self, answers: Tensor) -> Tensor:
        """Return, for answers `[S, M, B, O]`, which sum `[B, O]` of them is explained."""


class CrossEntropy:
    """Class probabilities by softmax; targets are class indices."""

    def __init__(self, classes: int) -> None:
        self.outputs = classes

    def of_answers(self, answers: Tensor, target: Tensor) -> Tensor:
        """Return -log p of the target's class."""
        return self._pick(-functional.log_softmax(answers, -1), target)

    def predict(self, answers: Tensor) -> Tensor:
        """Return probabilities."""
        return answers.softmax(-1)

    def of_predictions(self, predictions: Tensor, target: Tensor) -> Tensor:
        """Return -log p of the target's class."""
        tiny = torch.finfo(predictions.dtype).tiny
        return self._pick(-predictions.clamp_min(tiny).log(), target)

    def explained(self, answers: Tensor) -> Tensor:
        """Return the predicted class's logit less the mean of the others."""
        chosen = self.predict(answers).mean((0, 1)).argmax(-1)
        own = functional.one_hot(chosen, self.outputs).to(answers)
        # Logits mean something as differences only.
        return own - (1 - own) / (self.outputs - 1)

    @staticmethod
    def _pick(losses: Tensor, target: Tensor) -> Tensor:
        index = target[..., None].expand(*losses.shape[:-1], 1)
        return losses.gather(-1, index)[..., 0]


class SquaredError:
    """The conditional mean."""

    outputs = 1

    def of_answers(self, answers: Tensor, target: Tensor) -> Tensor:
        """Return (answer - target)^2."""
        return (answers[..., 0] - target) ** 2

    def predict(self, answers: Tensor) -> Tensor:
        """Return the answers."""
        return answers

    def explained(self, answers: Tensor) -> Tensor:
        """Return the answer."""
        return torch.ones_like(answers[0, 0])

    of_predictions = of_answers


class Pinball:
    """Conditional quantiles, one output each (Koenker and Bassett, 1978)."""

    def __init__(self, quantiles: tuple[float, ...]) -> None:
        self.outputs = len(quantiles)
        self.quantiles = quantiles

    def of_answers(self, answers: Tensor, target: Tensor) -> Tensor:
        """Return the mean over quantiles q of max(q e, (q - 1) e) for errors e."""
        error = target[..., None] - answers
        q = error.new_tensor(self.quantiles)
        return torch.maximum(q * error, (q - 1) * error).mean(-1)

    def predict(self, answers: Tensor) -> Tensor:
        """Return the answers, sorted where they cross."""
        return answers.sort(-1).values if self.outputs > 1 else answers

    def explained(self, answers: Tensor) -> Tensor:
        """Return the first quantile."""
        first = torch.zeros_like(answers[0, 0])
        first[:, 0] = 1
        return first

    of_predictions = of_answers
