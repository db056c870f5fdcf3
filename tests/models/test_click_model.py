"""The click model: every encoder over the same batches, and what a user of it relies on."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hashtab.models.ctr import ENCODERS, ClickModel, ClickModelSettings, FeatureSpec, TensorBatch
from hashtab.models.ctr.batch import Feature
from tests.models.batches import SPEC, batch_of, concatenate, random_user, shuffle_future
from tests.tolerances import TOLERANCE

CLOSE = TOLERANCE[torch.float32]
HISTORY_ENCODERS = sorted(set(ENCODERS) - {"none"})


def _model(encoder: str, *, counters: bool = True, window: int = 5) -> ClickModel:
    torch.manual_seed(0)
    settings = ClickModelSettings(
        encoder=encoder,
        embedding_size=8,
        planes=24,
        tau=3,
        window=window,
        hidden=(16,),
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


def test_behaviours_after_the_cut_change_no_score(model: ClickModel) -> None:
    user = random_user(3, n_behaviours=30)
    changed = shuffle_future(user, keep=int(user.cuts.max()))
    assert not torch.equal(changed.behaviours["item"], user.behaviours["item"])
    torch.testing.assert_close(model(changed), model(user), **CLOSE)


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


@pytest.mark.parametrize("encoder", ["sdim", "sdim_long_short"])
def test_hashes_survive_training_evaluation_and_reload(encoder: str, tmp_path: Path) -> None:
    # Public code draws planes per forward pass, or keeps them out of the state dict.
    model = _model(encoder)
    batch = random_user(1, n_behaviours=20)
    score = model(batch)
    model.train()
    model.eval()
    torch.testing.assert_close(model(batch), score, rtol=0, atol=0)
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


def test_a_model_without_counters_ignores_them() -> None:
    model = _model("sdim", counters=False)
    batch = random_user(5, n_behaviours=9)
    batch.counters.add_(1)
    other = random_user(5, n_behaviours=9)
    torch.testing.assert_close(model(batch), model(other), rtol=0, atol=0)


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
