"""Networks trained side by side: alike as if alone, each kept at its best epoch."""

from typing import Any

import numpy as np
import pytest
import torch

from hashtab.models.tabular.embedding import Encoded
from hashtab.models.tabular.encoding import NumericEncoder
from hashtab.models.tabular.losses import Pinball, SquaredError
from hashtab.models.tabular.network import TabNSANetwork
from hashtab.models.tabular.settings import NetworkSettings, TrainingSettings
from hashtab.models.tabular.training import (
    Average,
    Fold,
    Optimizer,
    ParameterMatrix,
    Sample,
    Trainer,
)
from tests.models.tabular.tables import numbers, regressor

ROWS, COLUMNS = 60, 3
FOLDS = [Fold(np.arange(i, ROWS, 2), np.arange(1 - i, ROWS, 2)) for i in range(2)]


def quiet(record: dict[str, float]) -> None:
    pass


def sample() -> Sample:
    x, y = numbers(ROWS, COLUMNS)
    parts = [part.T[None] for part in NumericEncoder(x, 8)(torch.from_numpy(x))]
    codes = torch.zeros(1, 0, ROWS, dtype=torch.int64)
    target = torch.from_numpy(y / y.std()).float()
    return Sample(Encoded(parts[0], parts[1], parts[2], codes), target, torch.ones(ROWS))


def network(count: int) -> TabNSANetwork:
    torch.manual_seed(0)
    settings = NetworkSettings(width=8, mixer_width=8, readout_width=8, dropout=0.0).sized(ROWS)
    return TabNSANetwork(count, COLUMNS, (), 1, settings)


def trainer(made: TabNSANetwork, folds: list[Fold], **changed: Any) -> Trainer:
    # One step an epoch: the order of rows does not matter then.
    settings = TrainingSettings(**({"max_epochs": 6, "batch_size": ROWS} | changed))
    rows = sample()
    return Trainer(made, SquaredError(), rows, rows, folds, settings, 0, quiet)


def copy_of(made: TabNSANetwork, index: int) -> TabNSANetwork:
    alone = network(1)
    alone.load_state_dict({k: v[index : index + 1] for k, v in made.state_dict().items()})
    return alone


def test_networks_train_as_if_alone() -> None:
    together = network(2)
    alone = [copy_of(together, i) for i in range(2)]
    trainer(together, FOLDS).fit()
    for i in range(2):
        trainer(alone[i], [FOLDS[i]]).fit()
        for a, b in zip(alone[i].parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=1e-3, atol=1e-5)


def test_each_network_is_left_at_its_best_epoch() -> None:
    made = network(2)
    training = trainer(made, FOLDS, max_epochs=60, patience=3, learning_rate=0.05, batch_size=8)
    validated: list[list[float]] = []
    validate = training._validate

    def recorded(folds: list[Fold]) -> torch.Tensor:
        losses = validate(folds)
        validated.append(losses.tolist() if len(folds) == 2 else [])
        return losses

    training._validate = recorded  # type: ignore[method-assign]
    history = training.fit()
    assert len(history) < 60
    both = np.array([losses for losses in validated if losses])
    final = validate(FOLDS).numpy()
    assert (final <= both.min(0) + 1e-6).all()
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert not made.training


def test_a_network_that_stopped_does_not_change() -> None:
    # Noise for one network's validation rows: it stops at once, and the other goes on.
    rows = sample()
    noise = Fold(FOLDS[0].train, FOLDS[0].validation)
    rows.target[noise.validation] = 100 * torch.randn(len(noise.validation))
    good = Fold(FOLDS[0].train, FOLDS[0].train)
    made = network(2)
    settings = TrainingSettings(max_epochs=40, patience=2, batch_size=8, learning_rate=0.02)
    history = Trainer(made, SquaredError(), rows, rows, [noise, good], settings, 0, quiet).fit()
    counts = [record["networks"] for record in history]
    assert counts[0] == 2
    assert counts[-1] == 1
    made.eval()
    answers = made(rows.rows)[:, 0, :, 0][:, torch.from_numpy(good.train)]
    errors = (answers - rows.target[good.train]).square().mean(1)
    assert errors[1] < 0.5 * errors[0]


def test_the_matrix_is_the_parameters() -> None:
    made = network(3)
    before = [parameter.detach().clone() for parameter in made.parameters()]
    matrix = ParameterMatrix(made)
    for a, b in zip(made.parameters(), before, strict=True):
        assert torch.equal(a, b)
    matrix.values += 1
    for a, b in zip(made.parameters(), before, strict=True):
        assert torch.equal(a, b + 1)
    matrix.keep(torch.tensor([0, 2]))
    for a, b in zip(made.parameters(), before, strict=True):
        assert torch.equal(a, b[[0, 2]] + 1)
    matrix.load(torch.zeros(3, matrix.values.shape[1]))
    for a, b in zip(made.parameters(), before, strict=True):
        assert a.shape == b.shape
        assert not a.any()


def test_gradients_are_taken_in_the_order_of_values() -> None:
    made = network(2)
    matrix = ParameterMatrix(made)
    answers = made(sample().rows)
    (0.5 * sum(p.square().sum() for p in made.parameters()) + 0 * answers.sum()).backward()
    torch.testing.assert_close(matrix.take_gradient(), matrix.values)
    assert not matrix.take_gradient().any()  # it is forgotten


def test_weights_alone_decay() -> None:
    made = network(1)
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    settings = TrainingSettings(weight_decay=0.5)
    Optimizer(ParameterMatrix(made), settings, steps_per_epoch=10).step()  # without a gradient
    for name, parameter in made.named_parameters():
        decays = name.endswith(("weight", "head")) and "norm" not in name
        torch.testing.assert_close(parameter, before[name] * (0.95 if decays else 1.0))


def test_leaving_a_network_out_does_not_change_the_steps_of_others() -> None:
    ends = []
    for leaves in (False, True):
        made = network(2)
        matrix = ParameterMatrix(made)
        optimizer = Optimizer(matrix, TrainingSettings(), steps_per_epoch=1)
        for step in range(6):
            if leaves and step == 3:
                matrix.keep(torch.tensor([1]))
                optimizer.keep(torch.tensor([1]))
            (made(sample().rows).square().mean((1, 2, 3)).sum() * 2.0**step).backward()
            optimizer.step()
        ends.append(matrix.values[-1])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


def test_averages_forget_early_steps_and_follow_a_span_later() -> None:
    average = Average(torch.zeros(2, 1), steps=50)
    for _ in range(200):
        average.update(torch.full((2, 1), -1.0))
    for _ in range(500):  # steps that scatter around 3
        average.update(3 + torch.randn(2, 1))
    torch.testing.assert_close(average.values, torch.full((2, 1), 3.0), atol=0.5, rtol=0)
    average.keep(torch.tensor([1]))
    assert average.values.shape == (1, 1)


def test_without_averaging_weights_are_as_they_are() -> None:
    values = torch.randn(2, 3)
    average = Average(torch.zeros(2, 3), steps=0)
    average.update(values)
    assert torch.equal(average.values, values)


def test_what_is_validated_is_the_average() -> None:
    validated = {}
    for averaging in (0.0, 2.0):
        made = trainer(network(1), FOLDS[:1], max_epochs=3, averaging=averaging, batch_size=8)
        validated[averaging] = min(record["validation_loss"] for record in made.fit())
        kept = float(made._validate(FOLDS[:1]))
        assert kept == pytest.approx(validated[averaging], rel=1e-4)
    assert validated[0.0] != pytest.approx(validated[2.0], rel=1e-4)


def test_validation_counts_each_row_once() -> None:
    folds = [Fold(np.arange(40), np.arange(40, 40 + count)) for count in (3, 10)]
    made = network(2)
    losses = trainer(made, folds)._validate(folds)
    rows = sample()
    answers = made(rows.rows)[:, 0, :, 0]
    for i, fold in enumerate(folds):
        errors = answers[i, fold.validation] - rows.target[fold.validation]
        torch.testing.assert_close(losses[i], errors.square().mean())


def test_validation_rows_are_never_trained_on() -> None:
    made, rows = network(2), sample()
    rows.target[FOLDS[0].validation] = float("nan")
    training = Trainer(
        made,
        SquaredError(),
        rows,
        sample(),
        [FOLDS[0]] * 2,
        TrainingSettings(max_epochs=2),
        0,
        quiet,
    )
    assert np.isfinite([record["training_loss"] for record in training.fit()]).all()


def test_divergence_of_one_network_is_an_error() -> None:
    rows = sample()
    rows.target[FOLDS[0].validation] = float("inf")
    settings = TrainingSettings(max_epochs=2, learning_rate=0.5)
    folds = [FOLDS[0], Fold(FOLDS[0].train, FOLDS[0].train)]
    training = Trainer(network(2), SquaredError(), rows, rows, folds, settings, 0, quiet)
    with pytest.raises(ValueError, match=r"1 of 2 networks .* lower learning_rate \(0.5 now\)"):
        training.fit()


def test_weights_scale_the_loss_of_validation() -> None:
    made, rows = network(1), sample()
    half = Fold(FOLDS[0].train, np.arange(10))
    plain = Trainer(made, SquaredError(), rows, rows, [half], TrainingSettings(), 0, quiet)
    rows.weight[5:10] = 0
    made.eval()
    answers = made(rows.rows)[0, 0, :5, 0]
    expected = (answers - rows.target[:5]).square().mean()
    torch.testing.assert_close(plain._validate([half])[0], expected)


@pytest.mark.parametrize("rows", [4, 30, 101])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_folds_are_disjoint_and_cover(rows: int, count: int) -> None:
    model = regressor(folds=count, max_epochs=1).fit(*numbers(rows))
    x, y = numbers(rows)
    data = model._standardised(model._labelled(model.table_.frame(x, model), y))
    folds = model._folds(data, None, count, 0)
    assert len(folds) == count
    for fold in folds:
        assert not set(fold.train) & set(fold.validation)
        assert sorted([*fold.train, *fold.validation]) == list(range(rows))
    if 1 < count <= rows // 2:
        held_out = np.concatenate([fold.validation for fold in folds])
        assert sorted(held_out) == list(range(rows))


def test_the_pinball_loss_is_least_at_the_quantiles() -> None:
    quantiles = (0.1, 0.5, 0.9)
    target = torch.from_numpy(np.random.default_rng(0).normal(size=4000)).float()
    best = torch.quantile(target, torch.tensor(quantiles))
    loss = Pinball(quantiles)
    least = loss.of_answers(best.expand(4000, 3), target).mean()
    for shift in (-0.2, 0.2):
        for q in range(3):
            moved = best.clone()
            moved[q] += shift
            assert loss.of_answers(moved.expand(4000, 3), target).mean() > least
