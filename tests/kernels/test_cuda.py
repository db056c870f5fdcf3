"""The definitions on a GPU: a model trains there with the results it has on the CPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hashtab.kernels import dense, nsa, sdim
from hashtab.kernels.core.library import apply
from hashtab.kernels.sdim.api import _AttendAt
from tests.kernels.histories import Histories
from tests.kernels.sparse import Sparse
from tests.tolerances import TOLERANCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def fast_matmul() -> Iterator[None]:
    """Hash under the settings that GPUs train with."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_codes_are_those_of_the_cpu() -> None:
    h = Histories.random([100_000], size=64, planes=80, dtype=torch.float32)
    expected = sdim.codes(h.values, h.planes, 5)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = sdim.codes(h.values.cuda(), h.planes.cuda(), 5, impl="reference").cpu()
    # A sum in another order turns a sign where the product is within rounding of zero.
    assert (found != expected).float().mean() < 1e-5


@pytest.mark.parametrize("last", [None, 50])
def test_attend_at_is_that_of_the_cpu(last: int | None) -> None:
    h = Histories.random([0, 1, 63, 111, 1000], size=40, planes=20, dtype=torch.float32)
    keys = (sdim.codes(h.values, h.planes, 5), sdim.codes(h.queries, h.planes, 5))
    results = []
    for device in ("cpu", "cuda"):
        values = h.values.to(device).requires_grad_()
        tensors = (h.offsets, *keys, h.query_offsets, h.cuts)
        moved: list[Tensor] = [tensor.to(device) for tensor in tensors]
        interest = apply(_AttendAt, values, *moved, 5, last, "auto")
        (grad,) = torch.autograd.grad(interest.square().sum(), values)
        results.append((interest.detach().cpu(), grad.cpu()))
    torch.testing.assert_close(*results, **TOLERANCE[torch.float32])


def test_encode_and_read_and_dense_run_and_agree() -> None:
    h = Histories.random([0, 1, 63, 111], dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        values, offsets, planes = h.values.to(device), h.offsets.to(device), h.planes.to(device)
        values.requires_grad_()
        queries = h.queries.view(4, 5, -1).to(device)
        table = sdim.encode(values, offsets, planes, 3)
        interest = sdim.read(table, queries, planes, 3)
        interest = interest + dense.target_attention(queries, values, offsets)
        heads = queries[:, :, None]
        windowed = dense.window_attention(heads, heads, heads, window=2, causal=True)
        interest = interest + windowed[:, :, 0]
        (grad,) = torch.autograd.grad(interest.square().sum(), values)
        results.append((interest.detach().cpu(), grad.cpu()))
    torch.testing.assert_close(*results, **TOLERANCE[torch.float64])


def test_gradients_are_deterministic() -> None:
    h = Histories.random([5000, 20], size=32, planes=20, queries=200, dtype=torch.float32)
    tensors = (h.offsets, h.queries, h.query_offsets, h.cuts, h.planes)
    offsets, queries, query_offsets, cuts, planes = (tensor.cuda() for tensor in tensors)
    grads = []
    for _ in range(2):
        values = h.values.cuda().requires_grad_()
        interest = sdim.attend_at(
            values, offsets, queries, query_offsets, cuts, planes, 5, impl="reference"
        )
        grads.append(torch.autograd.grad(interest.square().sum(), values)[0])
    assert torch.equal(*grads)


def test_native_sparse_attention_is_that_of_the_cpu() -> None:
    case = Sparse.random(70, group=3, stride=3, n_select=3, lengths=torch.tensor([70, 11]))
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in case.tensors]
        lengths = torch.tensor([70, 11], device=device)
        q, k, v, gates = leaves
        sizes = case.sizes | {"lengths": lengths}
        out = nsa.native_sparse_attention(q, k, v, gates=gates, **sizes)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        results.append([x.detach().cpu() for x in (out, *grads)])
    torch.testing.assert_close(*results, **TOLERANCE[torch.float64])
