"""The served parts of a click model: training's scores, from tables that nothing can disorder."""

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from hashtab.kernels import sdim
from hashtab.models.ctr import ENCODERS, ClickModel, ClickModelSettings, TensorBatch
from hashtab.models.ctr.encoders.base import TABLE_SCALE, ServedUsers
from hashtab.models.ctr.served import LARGEST_COMPONENT, ServedEncoder, ServedScorer
from tests.models.batches import (
    N_ITEMS,
    SPEC,
    batch_of,
    concatenate,
    random_user,
    samples_alone,
)
from tests.tolerances import TOLERANCE

CLOSE = TOLERANCE[torch.float32]
WINDOW, LIMIT = 5, 9
HASHING = ("sdim", "sdim_long_short")
WITH_TABLE = (*HASHING, "mean")
few = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def _model(
    encoder: str, *, planes: int = 24, tau: int = 3, history_limit: int | None = LIMIT
) -> ClickModel:
    torch.manual_seed(0)
    chosen = ClickModelSettings(
        encoder=encoder,
        embedding_size=8,
        planes=planes,
        tau=tau,
        window=WINDOW,
        history_limit=history_limit,
        hidden=(16,),
        counters=True,
    )
    return ClickModel(SPEC, chosen).eval()


MODELS = {name: _model(name) for name in sorted(ENCODERS)}


def _rows(columns: Sequence[Tensor], width: int) -> Tensor:
    """Columns as rows, padded with zeros at the end."""
    rows = [torch.nn.functional.pad(column, (0, width - len(column))) for column in columns]
    return torch.stack(rows)


def _served_inputs(model: ClickModel, requests: Sequence[TensorBatch]) -> dict[str, Tensor]:
    """What is kept of each request's user, whose history is all before it, and its candidates."""
    encoder = model.encoder
    inputs = {
        f"{role}.{name}": torch.stack([getattr(request, part)[name] for request in requests])
        for role, part in (("candidate", "candidates"), ("context", "context"))
        for name in getattr(requests[0], part)
    }
    inputs["counters"] = torch.stack([request.counters for request in requests])
    lengths = torch.tensor([int(request.history_offsets[-1]) for request in requests])
    if encoder.groups:
        kept = lengths if encoder.last is None else lengths.clamp(max=encoder.last)
        inputs["table"] = ServedEncoder(model)(_behaviours("behaviour", requests, kept))[0]
        if encoder.needs_count:
            inputs["behaviours"] = kept
    if encoder.recent:
        inputs["recent_lengths"] = lengths.clamp(max=encoder.recent)
        inputs |= _behaviours("recent", requests, inputs["recent_lengths"])
    return inputs


def _behaviours(role: str, requests: Sequence[TensorBatch], kept: Tensor) -> dict[str, Tensor]:
    """The latest behaviours of each request's user."""
    width = max(1, int(kept.max()))
    return {
        f"{role}.{name}": _rows(
            [
                request.behaviours[name][len(request.behaviours[name]) - count :]
                for request, count in zip(requests, kept.tolist(), strict=True)
            ],
            width,
        )
        for name in requests[0].behaviours
    }


@torch.inference_mode()
def _serve(model: ClickModel, requests: Sequence[TensorBatch]) -> Tensor:
    scores: Tensor = ServedScorer(model)(_served_inputs(model, requests))
    return scores


@torch.inference_mode()
def _encode(model: ClickModel, items: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Table `[G, buckets, D]`, codes `[L, G]` and vectors `[L, D]` of one user's items."""
    behaviours = batch_of(items, cuts=[], candidates=[]).behaviours
    inputs = {f"behaviour.{name}": column[None] for name, column in behaviours.items()}
    table, codes, vectors = ServedEncoder(model)(inputs)
    return table[0], codes[0], vectors[0]


def _sum_of_tables(model: ClickModel, pieces: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([_encode(model, piece)[0] for piece in pieces]).sum(0, dtype=torch.int32)


def _with_price_direction(model: ClickModel, direction: Tensor) -> ClickModel:
    """A model whose behaviours are their price times a direction, and whose items are nothing."""
    with torch.no_grad():
        model.objects.get_parameter("directions.0").copy_(direction)
        model.objects.get_parameter("tables.0.weight").zero_()
    return model


def _encode_prices(model: ClickModel, prices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    items = torch.ones(1, len(prices), dtype=torch.int32)
    table, codes, vectors = ServedEncoder(model)(
        {"behaviour.item": items, "behaviour.price": prices[None]}
    )
    return table[0], codes[0], vectors[0]


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
@few
@given(seeds, st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_users_served_together_score_as_in_training_at_every_cut(
    encoder: str, seed: int, lengths: list[int]
) -> None:
    model = MODELS[encoder]
    users = [random_user(seed + i, n_behaviours=n) for i, n in enumerate(lengths)]
    served = _serve(model, [sample for user in users for sample in samples_alone(user)])
    trained = model(concatenate(users)).detach().sigmoid()
    torch.testing.assert_close(served[:, 0], trained, **CLOSE)


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_candidates_score_as_in_training_beside_the_edges_of_window_and_limit(
    encoder: str,
) -> None:
    model = MODELS[encoder]
    lengths = (0, 1, WINDOW - 1, WINDOW, WINDOW + 1, LIMIT - 1, LIMIT, LIMIT + 1, 4 * LIMIT)
    requests = [
        batch_of([2 + i % 10 for i in range(n)], cuts=[n] * 5, candidates=range(1, 6))
        for n in lengths
    ]
    trained = model(concatenate(requests)).detach().sigmoid().view(len(lengths), 5)
    torch.testing.assert_close(_serve(model, requests), trained, **CLOSE)


@pytest.mark.parametrize("encoder", sorted(set(ENCODERS) - {"full_target_attention"}))
def test_a_model_without_a_limit_is_served_from_the_whole_history(encoder: str) -> None:
    model = _model(encoder, history_limit=None)
    user = random_user(7, n_behaviours=60)
    trained = model(user).detach().sigmoid()
    torch.testing.assert_close(_serve(model, samples_alone(user))[:, 0], trained, **CLOSE)


def test_exact_attention_over_everything_says_that_no_record_can_keep_it() -> None:
    assert _model("full_target_attention", history_limit=None).encoder.recent is None


@pytest.mark.parametrize("encoder", HASHING)
@few
@given(st.lists(st.integers(1, N_ITEMS - 1), min_size=1, max_size=40))
def test_a_table_is_the_kernels_in_fixed_point(encoder: str, items: list[int]) -> None:
    model = MODELS[encoder]
    planes = next(value for name, value in model.state_dict().items() if "planes" in name)
    behaviours = batch_of(items, cuts=[], candidates=[]).behaviours
    embedded = model.objects(behaviours, SPEC.behaviour).detach()
    table, codes, vectors = _encode(model, items)
    expected = sdim.encode(embedded, torch.tensor([0, len(items)]), planes, tau=3)[0]
    assert torch.equal(codes, sdim.codes(embedded, planes, tau=3))
    half_a_unit = 0.5 / TABLE_SCALE
    torch.testing.assert_close(vectors / TABLE_SCALE, embedded, rtol=0, atol=half_a_unit)
    rounding = half_a_unit * len(items) + CLOSE["atol"]
    torch.testing.assert_close(table / TABLE_SCALE, expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("encoder", WITH_TABLE)
@few
@given(
    st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=30),
    st.lists(st.integers(0, 30), max_size=3),
    st.randoms(use_true_random=False),
)
def test_order_and_pieces_do_not_change_a_bit_of_a_table(
    encoder: str, items: list[int], cuts: list[int], random: Random
) -> None:
    model = MODELS[encoder]
    whole = _encode(model, items)[0]
    shuffled = list(items)
    random.shuffle(shuffled)
    edges = [0, *sorted(min(cut, len(items)) for cut in cuts), len(items)]
    pieces = [shuffled[a:b] for a, b in pairwise(edges) if a < b]
    assert torch.equal(_sum_of_tables(model, pieces), whole)
    assert torch.equal(_sum_of_tables(model, [[item] for item in items]), whole)


@pytest.mark.parametrize("encoder", WITH_TABLE)
def test_padding_adds_nothing_to_a_table(encoder: str) -> None:
    model = MODELS[encoder]
    short, long = (batch_of(range(2, n), cuts=[], candidates=[]) for n in (4, 12))
    inputs = _behaviours("behaviour", [short, long], torch.tensor([2, 10]))
    together = ServedEncoder(model)(inputs)[0]
    assert torch.equal(together[0], _encode(model, [2, 3])[0])
    assert torch.equal(together[1], _encode(model, range(2, 12))[0])


@pytest.mark.parametrize("encoder", ["din", "target_attention", "sdim_long_short"])
@pytest.mark.parametrize("length", [0, 3])
def test_what_lies_in_the_padding_of_recent_behaviours_is_not_read(
    encoder: str, length: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    users = ServedUsers(
        candidates=torch.randn(1, 4, 8, generator=generator),
        buckets=torch.randint(8, (1, 4, 8), generator=generator) + 8 * torch.arange(8),
        table=torch.randn(1, 8, 8, 8, generator=generator),
        behaviours=torch.tensor([length]),
        recent=torch.randn(1, WINDOW, 8, generator=generator),
        recent_lengths=torch.tensor([length]),
    )
    zeros = users.recent * (torch.arange(WINDOW) < length)[:, None]
    serve = MODELS[encoder].encoder.serve
    torch.testing.assert_close(serve(users._replace(recent=zeros)), serve(users), rtol=0, atol=0)


@pytest.mark.parametrize("price", [256.0, -256.0, 1e30, float("inf"), float("-inf"), float("nan")])
def test_a_component_that_no_table_holds_shows_as_the_largest(price: float) -> None:
    model = _with_price_direction(_model("sdim"), torch.ones(8))
    _, _, vectors = _encode_prices(model, torch.tensor([1.0, price, 255.5]))
    assert vectors[:, 0].tolist() == [TABLE_SCALE, LARGEST_COMPONENT, 255.5 * TABLE_SCALE]


def test_the_sums_of_128_behaviours_are_exact_whatever_they_are() -> None:
    model = _with_price_direction(_model("mean"), torch.tensor([1.0, -1.0] * 4))
    table, _, vectors = _encode_prices(model, torch.full((128,), 255.999))
    assert vectors.abs().max() > LARGEST_COMPONENT - 100
    assert torch.equal(table[0, 0].long(), vectors.long().sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_hashes_in_float32_as_its_kernel_does(dtype: torch.dtype) -> None:
    model = _model("sdim", planes=48).to(dtype)
    embedded = torch.randn(500, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    planes = model.state_dict()["encoder.planes"]
    assert torch.equal(model.encoder.codes(embedded).int(), sdim.codes(embedded, planes, tau=3))


@pytest.mark.parametrize("tau", [1, 8, 16])
def test_codes_of_any_width_are_the_kernels(tau: int) -> None:
    model = _model("sdim", planes=48, tau=tau)
    embedded = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    planes = model.state_dict()["encoder.planes"]
    codes = model.encoder.codes(embedded)
    assert torch.equal(codes.int(), sdim.codes(embedded, planes, tau=tau))
    assert codes.max() >= 2 ** (tau - 1)


@pytest.mark.parametrize("encoder", ["none", "din", "target_attention"])
def test_an_encoder_without_a_table_says_so(encoder: str) -> None:
    with pytest.raises(NotImplementedError, match="keeps no table"):
        _encode(MODELS[encoder], [2, 3])
