"""Native sparse attention as a layer: shapes, padding, training, export, refusals."""

import logging
import warnings
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from hashtab.models.mixers import NativeSparseAttention
from tests.tolerances import TOLERANCE

kinds = pytest.mark.parametrize("compression", ["mean", "mlp"])
FLOAT32 = TOLERANCE[torch.float32]


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def mixer(**changed: Any) -> NativeSparseAttention:
    settings: dict[str, Any] = {"heads": 4, "kv_heads": 2, "block": 8, "stride": 4, "window": 4}
    layer = NativeSparseAttention(16, **(settings | changed))
    for parameter in layer.parameters():
        # Away from the start, where gates and learned compression are constant.
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@kinds
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_the_native_form_is_the_definition(compression: str, separate: bool, tokens: int) -> None:
    layer = mixer(compression=compression, separate=separate)
    x = torch.randn(2, 3, tokens, 16, requires_grad=True)
    results = []
    for impl in ("native", "reference"):
        out = layer(x, impl=impl)
        assert out.shape == x.shape
        grads = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        results.append((out, *grads))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@kinds
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(compression: str, causal: bool) -> None:
    layer = mixer(compression=compression, causal=causal)
    x, lengths = torch.randn(3, 30, 16), torch.tensor([30, 11, 0])
    out = layer(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert not out[row, length:].any()
        if length:
            alone = layer(x[row : row + 1, :length])
            torch.testing.assert_close(out[row, :length], alone[0], **FLOAT32)
    changed = x.masked_fill((torch.arange(30) >= lengths[:, None])[..., None], 50.0)
    torch.testing.assert_close(layer(changed, lengths), out, **FLOAT32)


@kinds
def test_a_causal_layer_does_not_see_the_future(compression: str) -> None:
    layer = mixer(compression=compression, causal=True)
    x = torch.randn(2, 30, 16)
    torch.testing.assert_close(layer(x[:, :13]), layer(x)[:, :13], **FLOAT32)


def test_starts_with_equal_gates_and_with_means() -> None:
    learned = NativeSparseAttention(16, compression="mlp")
    mean = NativeSparseAttention(16, compression="mean")
    mean.load_state_dict(learned.state_dict(), strict=False)
    x = torch.randn(2, 40, 16)
    torch.testing.assert_close(learned(x), mean(x), **FLOAT32)
    assert (learned.gates(x).sigmoid() == 0.5).all()


@kinds
def test_learns_to_copy_what_lies_far_away(compression: str) -> None:
    layer = NativeSparseAttention(
        16,
        heads=2,
        block=4,
        n_select=2,
        window=2,
        compression=compression,  # type: ignore[arg-type]
    )
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(64, 24, 16)
    x[:, 8, 0] += 4  # the token to copy is marked
    target = x[:, 8:9, 1:3].expand(-1, 24, -1)
    losses = []
    for _ in range(60):
        loss = (layer(x)[..., 1:3] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_tells_the_blocks_that_it_selects() -> None:
    layer = mixer(compression="mlp", separate=True, n_select=3)
    x, lengths = torch.randn(2, 2, 30, 16), torch.tensor([[30, 9], [1, 0]])
    chosen = layer.selected_blocks(x, lengths)
    assert chosen.shape == (2, 2, 30, 2, 3)
    assert torch.equal(chosen, layer.selected_blocks(x, lengths, impl="reference"))
    assert (chosen[0, 0, :, :, 0] == torch.arange(30)[:, None] // 8).all()
    assert (chosen[0, 1, :9] < 2).all()
    assert (chosen[1, 1] == -1).all()
    # Tokens of a block that is not selected do not matter to the selection branch.
    with torch.no_grad():
        layer.gates.weight.zero_()
        layer.gates.bias.copy_(torch.tensor([-99.0, 99.0, -99.0]).repeat(4))
    leaf = x[0, :1].clone().requires_grad_()
    layer.queries.requires_grad_(False)
    (grad,) = torch.autograd.grad(layer(leaf)[0, 3].sum(), leaf)
    used = set((grad[0].abs().sum(1) > 0).nonzero().flatten().floor_divide(8).tolist())
    assert used == set(layer.selected_blocks(leaf)[0, 3].flatten().tolist())


def test_exports_to_onnx_with_a_dynamic_batch() -> None:
    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = mixer(compression="mlp", n_select=3)

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.mixer(x, impl="reference")
            return mixed.mean(1)

    model = Scores().eval()
    session = onnxruntime.InferenceSession(onnx_bytes(model, torch.randn(2, 45, 16)))
    for batch in (1, 7):
        x = torch.randn(batch, 45, 16)
        x[0] = 0.1  # equal tokens: what is selected hangs on how ties are broken
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def onnx_bytes(model: torch.nn.Module, x: Tensor) -> bytes:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (x,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["x"],
            opset_version=20,
            verbose=False,
        )
    assert program is not None
    model_bytes: bytes = program.model_proto.SerializeToString()
    return model_bytes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got dim=0"),
        ({"heads": 0}, "heads must be at least 1, got heads=0"),
        ({"kv_heads": 3}, "kv_heads must divide heads, got kv_heads=3, heads=4"),
        ({"dim": 18}, "heads must divide dim where head_dim is None, got heads=4, dim=18"),
        ({"head_dim": 0}, "head_dim must be at least 1, got head_dim=0"),
        ({"stride": 17}, "stride must lie within 1 .. block, got stride=17, block=16"),
        ({"select_block": 0}, "select_block must be at least 1, got select_block=0"),
        ({"n_select": 0}, "n_select must be at least 1, got n_select=0"),
        ({"window": 0}, "window must be at least 1, got window=0"),
        ({"compression": "max"}, "compression must be one of .*got compression='max'"),
    ],
)
def test_wrong_settings(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention(**({"dim": 16} | changed))
