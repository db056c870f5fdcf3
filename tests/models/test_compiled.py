"""The click model as one graph: the results of the model as it is, whatever a batch's sizes."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hashtab.kernels import sdim
from hashtab.models.ctr import ENCODERS, ClickModel, ClickModelSettings, TensorBatch
from hashtab.models.ctr.encoders import HashSampledAttention, TargetAttention
from hashtab.models.ctr.on_gpu import compiled, mixed_precision
from tests.models.batches import SPEC, concatenate, random_user, samples_alone

# Of torch's own code, while it traces.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ONE_GRAPH = sorted(set(ENCODERS) - {"din"})
KERNELS = ["full_target_attention", "sdim", "sdim_long_short"]


def _model(encoder: str, history_limit: int | None = None) -> ClickModel:
    torch.manual_seed(0)
    settings = ClickModelSettings(
        encoder=encoder,
        embedding_size=8,
        planes=24,
        tau=3,
        window=5,
        history_limit=history_limit,
        hidden=(16,),
        dropout=0.0,
        counters=True,
    )
    return ClickModel(SPEC, settings)


def _users(*lengths: int) -> TensorBatch:
    return concatenate([random_user(seed, n_behaviours=n) for seed, n in enumerate(lengths)])


def _step(forward: nn.Module, model: ClickModel, users: TensorBatch) -> dict[str, Tensor]:
    """Return the logits and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    logits = forward(users)
    nn.functional.binary_cross_entropy_with_logits(logits, users.labels).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def _graphs(model: ClickModel, batches: Sequence[TensorBatch]) -> int:
    """Check each batch's step, compiled, and return how many graphs they took."""
    counter = CompileCounterWithBackend("aot_eager")
    forward = compiled(model, backend=counter)
    for users in batches:
        expected = _step(model, model, users)
        torch.testing.assert_close(_step(forward, model, users), expected)
    # A trace that torch gave up and began anew leaves an empty one.
    return sum(len(traced.graph.nodes) > 0 for traced in counter.graphs)


@pytest.mark.parametrize("encoder", ONE_GRAPH)
def test_one_graph_serves_batches_of_all_sizes(encoder: str) -> None:
    batches = [_users(12, 0, 4), _users(30, 7), _users(40, 40, 41, 2)]
    assert _graphs(_model(encoder, history_limit=20), batches) == 1


@pytest.mark.parametrize("encoder", ONE_GRAPH)
def test_lone_and_empty_users_are_ordinary(encoder: str) -> None:
    batches = [_users(9, 8), _users(1), _users(0, 0), _users(5), _users(0, 1)]
    assert _graphs(_model(encoder), batches) == 1


def test_a_single_sample_is_ordinary() -> None:
    batches = [_users(9, 8), *samples_alone(random_user(3, n_behaviours=6))]
    assert _graphs(_model("sdim"), batches) == 1


@pytest.mark.parametrize("encoder", KERNELS)
def test_the_graph_holds_the_kernels(encoder: str) -> None:
    model = _model(encoder)
    for module in model.modules():
        if isinstance(module, HashSampledAttention | TargetAttention):
            module.impl = "triton"
    assert _graphs(model, [_users(12, 0, 4), _users(17, 3)]) == 1


def test_what_cannot_be_one_graph_is_left_as_it_is() -> None:
    model = _model("din")
    assert compiled(model) is model


def test_a_training_on_a_cpu_is_not_rounded() -> None:
    with mixed_precision(torch.device("cpu")):
        assert _model("sdim").embed(_users(5)).behaviours.dtype == torch.float32


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_autocast_rounds_embeddings_before_the_encoder_reads_them(encoder: str) -> None:
    model, batch = _model(encoder), _users(20, 3)
    exact = model.embed(batch)
    with torch.autocast("cpu", torch.bfloat16):
        users = model.embed(batch)
        interest = model.encoder(users)
    assert torch.equal(users.behaviours, exact.behaviours.bfloat16())
    assert torch.equal(users.candidates, exact.candidates.bfloat16())
    assert interest.dtype == torch.bfloat16


def test_autocast_leaves_planes_and_hashing_in_float32() -> None:
    model, batch = _model("sdim"), _users(60)
    planes = model.get_buffer("encoder.planes").clone()
    with torch.autocast("cpu", torch.bfloat16):
        users = model.embed(batch)
        under = model.encoder(users)
        codes = sdim.codes(users.behaviours, planes, 3)
    assert model.get_buffer("encoder.planes").dtype == torch.float32
    assert torch.equal(codes, sdim.codes(users.behaviours.float(), planes, 3))
    assert torch.equal(under, model.encoder(users))
