"""Training of S networks side by side, each of which keeps its best epoch on its own rows."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hashtab.models.tabular.embedding import Encoded
from hashtab.models.tabular.losses import Loss
from hashtab.models.tabular.network import TabNSANetwork
from hashtab.models.tabular.settings import TrainingSettings

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """Rows to learn from.

    Attributes:
        rows: `[1, F, N]`, encoded, or `[S, F, N]` where networks read them differently.
        target: `[N]`, class indices or standardised numbers.
        weight: `[N]` float32.
    """

    rows: Encoded
    target: Tensor
    weight: Tensor

    def keep(self, networks: Tensor) -> "Sample":
        """Return the rows of the given networks, by index."""
        return replace(self, rows=self.rows.keep(networks))


@dataclass(frozen=True)
class Fold:
    """Which rows one network trains on, and which choose its best epoch (maybe of `held_out`)."""

    train: Rows
    validation: Rows


class ParameterMatrix:
    """The parameters of S networks as one matrix `[S, P]` in whose place they are.

    Optimising, clipping, keeping the best epoch and leaving finished networks out are operations
    on whole rows then.
    """

    def __init__(self, network: nn.Module) -> None:
        self._parameters = list(network.parameters())
        self.values = torch.cat([p.detach().flatten(1) for p in self._parameters], 1)
        self.decayed = torch.cat([_is_weight(n, p) for n, p in network.named_parameters()])
        self._attach()

    def keep(self, networks: Tensor) -> None:
        """Leave only the given networks, by index."""
        self.values = self.values[networks]
        self._attach()

    def load(self, values: Tensor) -> None:
        """Take other values `[S', P]`."""
        self.values = values
        self._attach()

    def _attach(self) -> None:
        start = 0
        for parameter in self._parameters:
            shape = parameter.shape[1:]
            part = slice(start, start + shape.numel())
            parameter.grad = None
            parameter.data = self.values[:, part].unflatten(1, shape)
            start = part.stop

    def take_gradient(self) -> Tensor:
        """Return the gradient `[S, P]` of the last backward pass, and forget it."""
        parts = []
        for parameter in self._parameters:
            gradient, parameter.grad = parameter.grad, None
            parts.append(torch.zeros_like(parameter) if gradient is None else gradient)
        return torch.cat([part.flatten(1) for part in parts], 1)


def _is_weight(name: str, parameter: Tensor) -> Tensor:
    decays = parameter.requires_grad and name.endswith(("weight", "head")) and "norm" not in name
    return torch.full((parameter[0].numel(),), float(decays), device=parameter.device)


class Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) on the rows of a matrix, each clipped on its own."""

    def __init__(
        self, parameters: ParameterMatrix, settings: TrainingSettings, steps_per_epoch: int
    ) -> None:
        self._parameters = parameters
        self._settings = settings
        self._decay = settings.weight_decay / steps_per_epoch
        self._make()

    def _make(self) -> None:
        values = self._parameters.values
        self._adam = torch.optim.AdamW(
            [values], lr=self._settings.learning_rate, weight_decay=0.0, fused=True
        )

    def step(self) -> None:
        """Move all networks along their gradients."""
        values, gradient = self._parameters.values, self._parameters.take_gradient()
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        gradient.mul_((self._settings.clip / (norm + 1e-6)).clamp(max=1))
        values.mul_(1 - self._decay * self._parameters.decayed)
        values.grad = gradient
        self._adam.step()

    def keep(self, networks: Tensor) -> None:
        """Follow the parameters after all but the given networks were left out."""
        (state,) = self._adam.state.values()
        self._make()
        kept = {name: value[networks] if value.dim() else value for name, value in state.items()}
        self._adam.state[self._parameters.values] = kept


class Average:
    """The weights of S networks averaged over the last epochs (Polyak and Juditsky, 1992).

    What steps of a constant rate scatter around is better than where the last one ended.
    """

    def __init__(self, values: Tensor, steps: float) -> None:
        self.values = values.clone()
        self._least_share = 1 / max(1.0, steps)
        self._steps = 0

    def update(self, values: Tensor) -> None:
        """Take the weights after a step in; early ones, far from any optimum, are forgotten."""
        self._steps += 1
        self.values.lerp_(values, max(self._least_share, 9 / (9 + self._steps)))

    def keep(self, networks: Tensor) -> None:
        """Leave only the given networks, by index."""
        self.values = self.values[networks]


@dataclass
class Best:
    """The best epoch of each network so far."""

    values: Tensor
    loss: Tensor
    epoch: Tensor

    def update(self, alive: Tensor, values: Tensor, loss: Tensor, epoch: int) -> None:
        """Take the values of those living networks whose loss fell."""
        better = loss < self.loss[alive]
        networks = alive[better]
        self.values[networks] = values[better]
        self.loss[networks] = loss[better]
        self.epoch[networks] = epoch


class Trainer:
    """Train networks until none has improved for a while, then leave them at their best epochs.

    Args:
        network: S networks.
        loss: what they minimise.
        sample: the rows.
        held_out: rows that `validation` of the folds refers to; `sample` itself mostly.
        folds: S of them.
        settings: of training.
        seed: of the order of rows.
        report: called after each epoch with its record; may show progress.
    """

    def __init__(
        self,
        network: TabNSANetwork,
        loss: Loss,
        sample: Sample,
        held_out: Sample,
        folds: list[Fold],
        settings: TrainingSettings,
        seed: int,
        report: Callable[[dict[str, float]], None],
    ) -> None:
        self.network, self.loss, self.settings = network, loss, settings
        self.sample, self.held_out, self.report = sample, held_out, report
        self.device = sample.target.device
        # Networks step together, so all see as many rows an epoch as the smallest fold has.
        self.rows = min(len(fold.train) for fold in folds)
        self._order = np.random.default_rng(seed)
        self.folds = folds
        self.parameters = ParameterMatrix(network)
        self.steps = math.ceil(self.rows / settings.batch(self.rows))
        self.optimizer = Optimizer(self.parameters, settings, self.steps)
        self.average = Average(self.parameters.values, settings.averaging * self.steps)

    def fit(self) -> list[dict[str, float]]:
        """Train; return a record of each epoch.

        Raises:
            ValueError: a network never had a finite validation loss, so no epoch of it is good.
        """
        networks = len(self.folds)
        best = Best(
            self.parameters.values.clone(),
            torch.full((networks,), math.inf, device=self.device),
            torch.zeros(networks, dtype=torch.int64, device=self.device),
        )
        alive = torch.arange(networks, device=self.device)
        history: list[dict[str, float]] = []
        deadline = time.monotonic() + (self.settings.time_budget or math.inf)
        for epoch in range(1, self.settings.max_epochs + 1):
            living = [self.folds[i] for i in alive.tolist()]
            training_loss = self._epoch(living)
            loss = self._validate_average(living)
            best.update(alive, self.average.values, loss, epoch)
            history.append(_record(epoch, training_loss, loss, len(living)))
            self.report(history[-1])
            going = (epoch - best.epoch[alive] < self.settings.patience).nonzero()[:, 0]
            if len(going) == 0 or time.monotonic() > deadline:
                break
            if len(going) < len(alive):
                alive = alive[going]
                self.sample = self.sample.keep(going)
                self.held_out = self.held_out.keep(going)
                self.parameters.keep(going)
                self.optimizer.keep(going)
                self.average.keep(going)
        self._check_finite(best)
        self.parameters.load(best.values)
        self.network.eval().requires_grad_(False)
        for parameter in self.network.parameters():
            parameter.data, parameter.grad = parameter.data.contiguous(), None
        return history

    def _check_finite(self, best: Best) -> None:
        diverged = int((best.epoch == 0).sum())
        if diverged:
            raise ValueError(
                f"training diverged: {diverged} of {len(best.epoch)} networks never had a finite "
                f"validation loss; lower learning_rate ({self.settings.learning_rate:g} now), or "
                "look for enormous numbers in the target"
            )

    def _epoch(self, folds: list[Fold]) -> float:
        self.network.train()
        shuffled = [self._order.permutation(fold.train)[: self.rows] for fold in folds]
        rows = torch.from_numpy(np.stack(shuffled))
        total = torch.zeros((), device=self.device)
        for batch in rows.to(self.device).tensor_split(self.steps, 1):
            answers = self.network(self.sample.rows.take(batch))
            target, weight = (
                part[batch][:, None] for part in (self.sample.target, self.sample.weight)
            )
            losses = self.loss.of_answers(answers, target)
            # The sum over networks: their gradients have nothing to do with each other.
            loss = (losses * weight).mean((1, 2)).sum()
            loss.backward()
            self.optimizer.step()
            self.average.update(self.parameters.values)
            total += loss.detach() / len(folds)
        return float(total) / self.steps

    def _validate_average(self, folds: list[Fold]) -> Tensor:
        trained = self.parameters.values
        self.parameters.load(self.average.values)
        loss = self._validate(folds)
        self.parameters.load(trained)
        return loss

    def _validate(self, folds: list[Fold]) -> Tensor:
        """Return the loss of each network, its members averaged, on its own validation rows."""
        self.network.eval()
        size = max(len(fold.validation) for fold in folds)
        rows = torch.from_numpy(np.stack([np.resize(fold.validation, size) for fold in folds]))
        once = torch.arange(size) < torch.tensor([len(fold.validation) for fold in folds])[:, None]
        losses = []
        with torch.no_grad():
            for batch in rows.to(self.device).split(self.network.rows_at_once(), 1):
                answers = self.network(self.held_out.rows.take(batch))
                predictions = self.loss.predict(answers).mean(1)
                losses.append(self.loss.of_predictions(predictions, self.held_out.target[batch]))
        weight = self.held_out.weight[rows.to(self.device)] * once.to(self.device)
        return (torch.cat(losses, 1) * weight).sum(1) / weight.sum(1).clamp_min(1e-12)


def _record(epoch: int, training: float, validation: Tensor, networks: int) -> dict[str, float]:
    return {
        "epoch": epoch,
        "training_loss": training,
        "validation_loss": float(validation.mean()),
        "networks": networks,
    }
