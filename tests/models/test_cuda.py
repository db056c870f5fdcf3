"""The click model on a GPU: the scores of the CPU, and hashing that autocast leaves alone."""

import pytest
import torch

from hashtab.models.ctr import ENCODERS, ClickModel, ClickModelSettings
from tests.models.batches import SPEC, concatenate, random_user
from tests.tolerances import TOLERANCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
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


def test_autocast_moves_no_bucket() -> None:
    users = random_user(0, n_behaviours=200).to("cuda")
    model = _model("sdim").cuda()
    with torch.no_grad():
        plain = model.encoder(model.embed(users))
        with torch.autocast("cuda", torch.bfloat16):
            cast = model.encoder(model.embed(users))
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
