"""The click model: every encoder over the same batches, and what a user of it relies on."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hashtab.models.ctr import ENCODERS, ClickModel, ClickModelSettings, FeatureSpec, TensorBatch
from hashtab.models.ctr.batch import Feature
from tests.models.batches import SPEC, batch_of, concatenate, random_user, samples_alone
from tests.tolerances import TOLERANCE

CLOSE = TOLERANCE[torch.float32]
HISTORY_ENCODERS = sorted(set(ENCODERS) - {"none"})


def _model(
    encoder: str,
    *,
    counters: bool = True,
    window: int = 5,
    dropout: float = 0.1,
    history_limit: int | None = None,
) -> ClickModel:
    torch.manual_seed(0)
    settings = ClickModelSettings(
        encoder=encoder,
        embedding_size=8,
        planes=24,
        tau=3,
        window=window,
        history_limit=history_limit,
        hidden=(16,),
        dropout=dropout,
        counters=counters,
    )
    return ClickModel(SPEC, settings).eval()


@pytest.fixture(params=sorted(ENCODERS))
def model(request: pytest.FixtureRequest) -> ClickModel:
    return _model(request.param)


def test_batch_mates_change_no_score(model: ClickModel) -> None:
    users = [random_user(seed, n_behaviours=n) for seed, n in enumerate((7, 0, 40, 1))]
    alone = torch.cat([model(user) for user in users])
    torch.testing.assert_close(model(concatenate(users)), alone, **CLOSE)


def test_a_sample_sees_its_history_up_to_its_cut_and_nothing_else(model: ClickModel) -> None:
    users = [random_user(seed, n_behaviours=30) for seed in range(3)]
    alone = torch.cat([model(sample) for user in users for sample in samples_alone(user)])
    torch.testing.assert_close(model(concatenate(users)), alone, **CLOSE)


@pytest.mark.parametrize("encoder", HISTORY_ENCODERS)
def test_the_last_visible_behaviour_changes_the_score(encoder: str) -> None:
    model = _model(encoder, counters=False)
    user = batch_of([3, 4, 5], cuts=[3], candidates=[5])
    other = batch_of([3, 4, 9], cuts=[3], candidates=[5])
    assert not torch.allclose(model(user), model(other), **CLOSE)


@pytest.mark.parametrize("encoder", HISTORY_ENCODERS)
def test_an_empty_history_is_an_ordinary_user(encoder: str) -> None:
    model = _model(encoder)
    interest = model.encoder(model.embed(batch_of([], cuts=[0, 0], candidates=[2, 3])))
    assert torch.equal(interest, torch.zeros_like(interest))


@pytest.mark.parametrize("longest", [1, 2, 3, 49, 50])
@pytest.mark.parametrize("encoder", ["din", "target_attention", "sdim_long_short"])
def test_a_batch_may_be_shorter_than_the_short_window(encoder: str, longest: int) -> None:
    # Public SDIM code slices the last 50 of a padded batch and fails on a cold one.
    model = _model(encoder, window=50)
    whole = _model(encoder, window=1000)
    whole.load_state_dict(model.state_dict())
    users = concatenate([random_user(n, n_behaviours=n) for n in (0, 1, longest)])
    torch.testing.assert_close(model(users), whole(users), **CLOSE)


@pytest.mark.parametrize("encoder", ["din", "target_attention"])
def test_the_short_window_holds_exactly_so_many_behaviours(encoder: str) -> None:
    # Public code masks one position off: 50 means 49, and a user with one behaviour has none.
    model = _model(encoder, counters=False, window=4)
    history = [2, 3, 4, 5, 6, 7]
    score = model(batch_of(history, cuts=[6], candidates=[9]))
    outside = model(batch_of([8, 8, *history[2:]], cuts=[6], candidates=[9]))
    inside = model(batch_of([2, 3, 8, *history[3:]], cuts=[6], candidates=[9]))
    torch.testing.assert_close(outside, score, **CLOSE)
    assert not torch.allclose(inside, score, **CLOSE)


@pytest.mark.parametrize("encoder", HISTORY_ENCODERS)
def test_a_limit_holds_for_every_sample_of_a_user(encoder: str) -> None:
    # A batch holds what its first sample may see; a later one must not see more for that.
    model = _model(encoder, counters=False, history_limit=4)
    history = [2, 3, 4, 5, 6, 7]
    first, last = model(batch_of(history, cuts=[4, 6], candidates=[9, 9]))
    alone = model(batch_of(history[2:], cuts=[4], candidates=[9]))
    torch.testing.assert_close(last, alone[0], **CLOSE)
    assert not torch.allclose(first, last, **CLOSE)


@pytest.mark.parametrize("encoder", ["sdim", "sdim_long_short"])
def test_hashes_survive_training_evaluation_and_reload(encoder: str, tmp_path: Path) -> None:
    # Public code draws planes per forward pass, or keeps them out of the state dict.
    model = _model(encoder, dropout=0.0)
    batch = random_user(1, n_behaviours=20)
    score = model(batch)
    torch.testing.assert_close(model.train()(batch), score, rtol=0, atol=0)
    torch.testing.assert_close(model.eval()(batch), score, rtol=0, atol=0)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)
    reloaded = ClickModel(SPEC, model.settings).eval()
    reloaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(reloaded(batch), score, rtol=0, atol=0)


@pytest.mark.parametrize("encoder", HISTORY_ENCODERS)
def test_gradients_reach_behaviours_and_nothing_is_nan(encoder: str) -> None:
    model = _model(encoder).train()
    users = concatenate([random_user(seed, n_behaviours=n) for seed, n in enumerate((12, 0, 3))])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(users), users.labels)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    item_table = model.objects.tables[0].weight.grad
    assert isinstance(item_table, Tensor)
    seen = users.behaviours["item"][: int(users.cuts[: int(users.sample_offsets[1])].max())]
    assert bool((item_table[seen.long()].abs().sum(1) > 0).all())
    assert torch.equal(item_table[0], torch.zeros_like(item_table[0]))


@pytest.mark.parametrize("encoder", ["din", "target_attention"])
def test_no_gradient_comes_from_outside_the_window(encoder: str) -> None:
    # Public code computes the mask of what is retrieved and attends to everything.
    model = _model(encoder, window=4)
    users = model.embed(random_user(2, n_behaviours=20))
    behaviours = users.behaviours.detach().requires_grad_()
    last = int(users.cuts[-1])
    (gradient,) = torch.autograd.grad(
        model.encoder(users._replace(behaviours=behaviours))[-1].square().sum(), behaviours
    )
    assert bool((gradient[last - 4 : last].abs().sum(1) > 0).all())
    assert torch.equal(gradient[: last - 4], torch.zeros_like(gradient[: last - 4]))
    assert torch.equal(gradient[last:], torch.zeros_like(gradient[last:]))


@pytest.mark.parametrize("counters", [True, False])
def test_counters_are_read_when_asked_for(counters: bool) -> None:
    model = _model("sdim", counters=counters)
    batch = random_user(5, n_behaviours=9)
    more = replace(batch, counters=batch.counters + 1)
    assert torch.equal(model(more), model(batch)) is not counters


def test_the_context_is_read() -> None:
    model = _model("sdim")
    batch = random_user(5, n_behaviours=9)
    later = replace(batch, context={"hour": batch.context["hour"] - 1})
    assert not torch.allclose(model(later), model(batch), **CLOSE)


def test_dropout_works_in_training_only() -> None:
    model = _model("sdim", dropout=0.5)
    batch = random_user(5, n_behaviours=9)
    assert torch.equal(model(batch), model(batch))
    model.train()
    assert not torch.equal(model(batch), model(batch))


@pytest.mark.parametrize("half", ["long", "short"])
def test_both_halves_of_the_long_and_short_pair_are_read(half: str) -> None:
    model = _model("sdim_long_short")
    batch = random_user(5, n_behaviours=30)
    score = model(batch)
    part = model.encoder.get_submodule(half)
    part.forward = lambda users: torch.zeros_like(users.candidates)
    assert not torch.allclose(model(batch), score, **CLOSE)


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_padding_and_items_unseen_in_training_start_as_nothing(encoder: str) -> None:
    model = _model(encoder)
    weight = model.state_dict()["objects.tables.0.weight"]
    assert torch.equal(weight[:2], torch.zeros(2, 8))
    assert bool((weight[2:].abs().sum(1) > 0).all())
    users = model.embed(batch_of([1, 1, 4], cuts=[3], candidates=[1]))
    assert bool(model.encoder(users).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_hashes_with_the_planes_it_was_trained_with(dtype: torch.dtype) -> None:
    model = _model("sdim_long_short")
    planes = model.state_dict()["encoder.long.planes"].clone()
    assert model.to(dtype).output.weight.dtype == dtype
    cast = model.state_dict()["encoder.long.planes"]
    torch.testing.assert_close(cast, planes, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_a_cast_model_scores_nearly_the_same(encoder: str, dtype: torch.dtype) -> None:
    batch = random_user(5, n_behaviours=30)
    model = _model(encoder, window=50)
    expected = model(batch)
    found = model.to(dtype)(batch)
    assert found.dtype == torch.float32
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.99


def test_the_order_of_declaration_is_not_part_of_the_state() -> None:
    model = _model("sdim")
    turned = FeatureSpec(
        behaviour=SPEC.behaviour[::-1],
        candidate=SPEC.candidate[::-1],
        context=SPEC.context,
        counters=SPEC.counters,
    )
    other = ClickModel(turned, model.settings).eval()
    other.load_state_dict(model.state_dict())
    batch = random_user(5, n_behaviours=9)
    torch.testing.assert_close(other(batch), model(batch), **CLOSE)


@pytest.mark.parametrize("place", ["behaviours", "candidates", "context"])
def test_a_missing_column_is_named(place: str) -> None:
    batch = random_user(5, n_behaviours=9)
    columns = dict(getattr(batch, place))
    missing = columns.popitem()[0]
    lacking: dict[str, Any] = {place: columns}
    with pytest.raises(ValueError, match=f"lacks the columns \\['{missing}'\\]"):
        _model("sdim")(replace(batch, **lacking))


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_a_cut_past_the_history_is_refused(encoder: str) -> None:
    users = concatenate([random_user(seed, n_behaviours=9) for seed in range(2)])
    past = replace(users, cuts=users.cuts.index_fill(0, torch.tensor([4]), 10))
    with pytest.raises(ValueError, match=r"cuts\[4\] = 10 for user 0 with 9 behaviours"):
        _model(encoder)(past)


@pytest.mark.parametrize("offsets", [[0, 15], [3, 20], [0, 40]])
@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_offsets_that_do_not_fit_are_refused(encoder: str, offsets: list[int]) -> None:
    batch = random_user(5, n_behaviours=20)
    wrong = replace(batch, history_offsets=torch.tensor(offsets))
    with pytest.raises(ValueError, match="history_offsets must start at 0"):
        _model(encoder)(wrong)


def test_a_batch_is_checked_when_it_leaves_the_cpu() -> None:
    # On a GPU no one looks again: it would wait for all work before.
    past = replace(random_user(0, n_behaviours=9), cuts=torch.tensor([0, 1, 2, 3, 10]))
    with pytest.raises(ValueError, match=r"cuts\[4\] = 10 for user 0 with 9 behaviours"):
        past.to("meta")
    assert past.to("cpu").cuts.tolist() == [0, 1, 2, 3, 10]


@pytest.mark.parametrize("name", ["type", "a.b", "forward", "päckung 1"])
def test_a_feature_may_have_any_name(name: str) -> None:
    spec = FeatureSpec(
        behaviour=(Feature(name=name, kind="categorical", size=5),),
        candidate=(Feature(name=name, kind="categorical", size=5),),
    )
    model = ClickModel(spec, ClickModelSettings(encoder="mean"))
    batch = TensorBatch(
        history_offsets=torch.tensor([0, 1]),
        behaviours={name: torch.tensor([2])},
        sample_offsets=torch.tensor([0, 1]),
        cuts=torch.tensor([1]),
        candidates={name: torch.tensor([3])},
        context={},
        counters=torch.zeros(1, 0),
        labels=torch.ones(1),
    )
    assert model(batch).shape == (1,)


def test_one_name_with_two_sizes_is_refused() -> None:
    spec = FeatureSpec(
        behaviour=(Feature(name="item", kind="categorical", size=5),),
        candidate=(Feature(name="item", kind="categorical", size=6),),
    )
    with pytest.raises(ValueError, match="'item' is declared twice"):
        ClickModel(spec, ClickModelSettings())


def test_objects_without_features_are_refused() -> None:
    with pytest.raises(ValueError, match="need one feature at least"):
        ClickModel(FeatureSpec(behaviour=(), candidate=SPEC.candidate), ClickModelSettings())


def test_counters_that_the_data_lacks_are_refused() -> None:
    spec = FeatureSpec(behaviour=SPEC.behaviour, candidate=SPEC.candidate)
    with pytest.raises(ValueError, match="declares no counters"):
        ClickModel(spec, ClickModelSettings(counters=True))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tau": 5, "planes": 48}, "tau must divide planes"),
        ({"tau": 17, "planes": 34}, "tau must be between 1 and 16"),
        ({"tau": 0}, "tau must be between 1 and 16"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"hidden": (8, 0)}, "hidden widths must be positive"),
        ({"history_limit": 0}, "history_limit must be positive"),
        ({"embedding_size": 0}, "embedding_size must be positive"),
        ({"encoder": "sidm"}, "did you mean 'sdim'"),
    ],
)
def test_bad_settings_are_refused_where_they_are_made(
    setting: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ClickModelSettings(**setting)  # type: ignore[arg-type]  # that is the test


def test_the_spec_survives_json() -> None:
    assert FeatureSpec.from_dict(json.loads(json.dumps(asdict(SPEC)))) == SPEC
