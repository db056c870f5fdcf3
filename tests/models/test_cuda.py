"""The click model on a GPU: scores of the CPU, hashing under autocast, compiled training."""

import pytest
import torch

from hashtab.models.ctr import ENCODERS, ClickModel, ClickModelSettings, TensorBatch
from hashtab.models.ctr.on_gpu import compiled, mixed_precision
from tests.models.batches import SPEC, concatenate, random_user
from tests.tolerances import TOLERANCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Of torch's own code, while it traces, and that its debug mode is a prototype.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:Synchronization debug mode",
        "ignore:TensorFloat32 tensor cores",
    ),
]


def _model(encoder: str) -> ClickModel:
    torch.manual_seed(0)
    settings = ClickModelSettings(encoder=encoder, embedding_size=16, planes=24, tau=3)
    return ClickModel(SPEC, settings).eval()


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_scores_and_gradients_are_those_of_the_cpu(encoder: str) -> None:
    users = concatenate([random_user(seed, n_behaviours=n) for seed, n in enumerate((30, 0, 7))])
    scores, gradients = [], []
    for device in ("cpu", "cuda"):
        model = _model(encoder).to(device)
        score = model(users.to(device))
        score.square().sum().backward()
        scores.append(score.detach().cpu())
        gradients.append(model.objects.tables[0].weight.grad.cpu())  # type: ignore[union-attr]
    torch.testing.assert_close(scores[1], scores[0], **TOLERANCE[torch.float32])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_it_trains_under_bfloat16_autocast(encoder: str) -> None:
    users = concatenate([random_user(seed, n_behaviours=20) for seed in range(4)]).to("cuda")
    model = _model(encoder).cuda().train()
    optimiser = torch.optim.AdamW(model.parameter_groups(1e-2, 1e-2, 0.0))
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(users)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, users.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_autocast_moves_no_bucket_of_the_rows_it_rounded() -> None:
    batch = random_user(0, n_behaviours=200).to("cuda")
    model = _model("sdim").cuda()
    with torch.no_grad():
        with mixed_precision(torch.device("cuda")):
            users = model.embed(batch)
            cast = model.encoder(users)
        plain = model.encoder(users)
    assert users.behaviours.dtype == users.candidates.dtype == cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def _step(
    forward: torch.nn.Module, model: ClickModel, users: TensorBatch, mixed: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and the gradients of all parameters, one after the other."""
    model.zero_grad(set_to_none=True)
    with mixed_precision(torch.device("cuda" if mixed else "cpu")):
        logits = forward(users)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, users.labels).backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach().float(), torch.cat(grads)


@pytest.mark.parametrize("encoder", [name for name in sorted(ENCODERS) if name != "din"])
def test_compiled_training_is_eager_training(encoder: str) -> None:
    model = _model(encoder).cuda()
    forward = compiled(model)
    for lengths in ((30, 0, 7), (100, 3), (20, 20, 20, 41)):
        users = concatenate([random_user(s, n_behaviours=n) for s, n in enumerate(lengths)])
        steps = (_step(forward, model, users.to("cuda")), _step(model, model, users.to("cuda")))
        exact = _step(model, model, users.to("cuda"), mixed=False)
        for found, eager, value in zip(*steps, exact, strict=True):
            # One rounds to bfloat16 where the other does not, and a hidden unit may turn by it.
            apart, rounding = (found - eager).norm(), (eager - value).norm()
            assert apart <= 2 * rounding + 0.02 * value.norm()


@pytest.mark.parametrize("encoder", ["sdim", "sdim_long_short", "full_target_attention"])
def test_a_compiled_step_does_not_wait_for_the_gpu(encoder: str) -> None:
    model = _model(encoder).cuda().train()
    forward = compiled(model)
    users = concatenate([random_user(seed, n_behaviours=30) for seed in range(3)]).to("cuda")
    device = torch.device("cuda")

    def step() -> None:
        with mixed_precision(device):
            logits = forward(users)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, users.labels).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
