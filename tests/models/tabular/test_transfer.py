"""Weights carried over from one table to another."""

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from torch import Tensor

from hashtab.models.tabular import TabNSAClassifier, TabNSARegressor, settings
from hashtab.models.tabular.training import Trainer
from tests.models.tabular.tables import classifier, mixed, numbers, regressor

X, LABELS = mixed()
STILL: dict[str, Any] = {"max_epochs": 1, "learning_rate": 1e-12, "weight_decay": 0.0}

variants = pytest.mark.parametrize(
    "changed",
    [
        {},
        {"attention": "sparse", "block": 2, "members": 2, "fusion": "gate"},
        {"readout": "mean", "numeric": "periodic"},
        {"columns": "shared", "numeric": "linear"},
    ],
    ids=str,
)


@pytest.fixture(scope="module")
def source() -> TabNSAClassifier:
    return classifier(members=2).fit(X, LABELS)


def untrained(trainer: Trainer) -> list[dict[str, float]]:
    trainer.network.requires_grad_(False)
    return []


def weights(model: TabNSAClassifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.network_.named_parameters()}


@variants
def test_the_same_table_begins_where_the_source_ended(changed: dict[str, Any]) -> None:
    source = classifier(**changed).fit(X, LABELS)
    moved = classifier(**(changed | STILL)).fit(X[X.columns], LABELS, warm_start_from=source)
    np.testing.assert_allclose(moved.predict_proba(X), source.predict_proba(X), atol=1e-5)


@variants
def test_shared_columns_keep_their_weights(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = classifier(**changed).fit(X, LABELS)
    other = X[["member", "income", "city"]].assign(new=np.arange(len(X), dtype=float))
    other["city"] = other["city"].replace({"Lima": "Rome"})
    monkeypatch.setattr(Trainer, "fit", untrained)
    moved = classifier(**changed).fit(other, LABELS, warm_start_from=source)
    assert torch.equal(weights(source)["head"], weights(moved)["head"])
    if changed.get("columns") == "shared":
        return
    # Tokens of what both tables know are the same, in every row.
    both = X.assign(new=0.0)
    both.loc[both["city"] == "Lima", "city"] = "Oslo"
    before, after = tokens(source, both), tokens(moved, both)
    for name in ("income", "member", "city"):
        assert torch.equal(before[name], after[name]), name
    assert after["new"].any()


def tokens(model: TabNSAClassifier, x: pd.DataFrame) -> dict[str, Tensor]:
    table = model.table_
    names = [table.names[i] for i in (*table.numeric, *table.categorical)]
    with torch.no_grad():
        out = model.network_.tokens(model._encode(*model._inputs(table.frame(x, model))))
    return dict(zip(names, out.unbind(1), strict=True))


def test_parts_of_columns_follow_their_columns(
    source: TabNSAClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "fit", untrained)
    other = X[["income", "age"]].assign(new=np.arange(len(X), dtype=float))
    moved = classifier(members=2).fit(other, LABELS, warm_start_from=source)
    before, after = weights(source), weights(moved)
    # Numbers of the source: age, income, code. Of the new table: income, age, new.
    for new, old in ((0, 1), (1, 0)):
        for name in ("tokens.identity", "tokens.numbers.weight", "adapter"):
            assert torch.equal(after[name][:, new], before[name][:, old]), name
        name = "blocks.0.branches.0.columns_in.weight"
        assert torch.equal(after[name][..., new], before[name][..., old])
        name = "blocks.0.branches.0.columns_out.weight"
        assert torch.equal(after[name][:, new], before[name][:, old])
        name = "readout.linear.weight"
        assert torch.equal(
            after[name].unflatten(1, (3, 8))[:, new], before[name].unflatten(1, (5, 8))[:, old]
        )
    assert not torch.equal(after["tokens.identity"][:, 2], before["tokens.identity"][:, 2])
    for name in ("head", "head_bias", "readout.norm.weight", "readout.linear.bias"):
        assert torch.equal(after[name], before[name]), name


def test_a_frozen_backbone_stays(source: TabNSAClassifier) -> None:
    moved = classifier(members=2, learning_rate=0.05).fit(
        X, LABELS, warm_start_from=source, freeze_backbone=True
    )
    before, after = weights(source), weights(moved)
    for name in before:
        trained = name.startswith(("tokens.", "head"))
        assert torch.equal(before[name], after[name]) != trained, name


def test_another_number_of_networks_is_fine(source: TabNSAClassifier) -> None:
    moved = classifier(members=2, folds=3, **STILL).fit(X, LABELS, warm_start_from=source)
    head, before = moved.network_.head, source.network_.head
    torch.testing.assert_close(head, before[[0, 1, 0]], rtol=0, atol=1e-6)


def test_sizes_of_a_long_table_are_kept_on_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    by_rows = {"width": None, "readout_width": None, "mixer_width": None}
    monkeypatch.setattr(settings, "LARGE_FROM", len(X))
    large = classifier(**by_rows).fit(X, LABELS)
    moved = classifier(**(by_rows | STILL)).fit(X[:60], LABELS[:60], warm_start_from=large)
    assert moved.network_.settings == large.network_.settings
    np.testing.assert_allclose(moved.predict_proba(X), large.predict_proba(X), atol=1e-5)


def test_a_new_head_for_other_classes(source: TabNSAClassifier) -> None:
    labels = np.arange(len(X)) % 3
    moved = classifier(members=2, **STILL).fit(X, labels, warm_start_from=source)
    assert moved.predict_proba(X).shape == (len(X), 3)


def test_an_estimator_may_go_on_from_itself() -> None:
    x, y = numbers(60)
    model = regressor().fit(x, y)
    before = model.predict(x)
    model.set_params(**STILL).fit(x, y, warm_start_from=model)
    np.testing.assert_allclose(model.predict(x), before, atol=1e-4)


@pytest.mark.parametrize("names", [X.columns[::-1], ["member", "income", "city"]], ids=len)
def test_going_on_from_itself_is_going_on_from_a_copy(
    source: TabNSAClassifier, names: list[str]
) -> None:
    model = copy.deepcopy(source).set_params(**STILL)
    other = X[names].assign(new=np.arange(len(X), dtype=float))
    expected = clone(model).fit(other, LABELS, warm_start_from=source).predict_proba(other)
    model.fit(other, LABELS, warm_start_from=model)
    np.testing.assert_array_equal(model.predict_proba(other), expected)
    with pytest.raises(ValueError, match=r"same settings of the network, .*members=2.* for .*=1"):
        model.set_params(members=1).fit(other, LABELS, warm_start_from=model)


def test_targets_of_another_scale_are_fine() -> None:
    x, y = numbers()
    source = regressor(max_epochs=15).fit(x, y)
    moved = regressor(**STILL).fit(x, 1000 * y + 5, warm_start_from=source)
    np.testing.assert_allclose(moved.predict(x), 1000 * source.predict(x) + 5, rtol=1e-3, atol=1)


def test_what_cannot_be_carried_over_is_refused(source: TabNSAClassifier) -> None:
    with pytest.raises(ValueError, match=r"same settings of the network, .*members=2"):
        classifier().fit(X, LABELS, warm_start_from=source)
    other = pd.DataFrame({"city": np.arange(len(X)), "n": 1.0})  # city is a number now
    with pytest.raises(ValueError, match="must share a column"):
        classifier(members=2).fit(other, LABELS, warm_start_from=source)
    fresh = classifier()
    for other in (fresh, TabNSAClassifier()):
        with pytest.raises(ValueError, match="warm_start_from must be fitted"):
            fresh.fit(X, LABELS, warm_start_from=other)
    with pytest.raises(ValueError, match="freeze_backbone=True needs warm_start_from"):
        TabNSARegressor().fit(*numbers(20), freeze_backbone=True)


@pytest.mark.parametrize(("before", "now"), [(3, 600), (600, 3)])
def test_readouts_of_different_kinds_are_refused(before: int, now: int) -> None:
    x, y = numbers(20, 600)
    model = regressor(max_epochs=1)
    source = clone(model).fit(x[:, :before], y)
    with pytest.raises(ValueError, match=r'with readout="auto", .*: set readout="mean" in both'):
        model.fit(x[:, :now], y, warm_start_from=source)
    source = clone(model).set_params(readout="mean").fit(x[:, :before], y)
    model.set_params(readout="mean").fit(x[:, :now], y, warm_start_from=source)
