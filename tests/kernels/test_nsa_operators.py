"""Native sparse attention as torch sees it: registration, compilation, export, autocast."""

import pytest
import torch
from torch import Tensor

from hashtab.kernels import nsa
from hashtab.kernels.core.dispatch import Impl
from tests.kernels.sparse import Sparse
from tests.tolerances import TOLERANCE

ops = torch.ops.hashtab
impls = pytest.mark.parametrize("impl", ["reference", "native"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [None, torch.tensor([21, 4])], ids=["whole", "padded"])
def test_operators_pass_opcheck(dtype: torch.dtype, lengths: Tensor | None) -> None:
    s = Sparse.random(21, dtype=dtype, value_size=6)
    strided = s.k.transpose(1, 3).contiguous().transpose(1, 3)
    compressed = [nsa.compress_mean(x, s.block, s.stride) for x in (s.k, s.v)]
    keys = [*compressed, strided, s.v, strided, s.v]
    arguments = (s.q, keys, s.gates, lengths, 0.3, 8, 4, 8, 2, 5, True)
    torch.library.opcheck(ops.nsa_attend, arguments)
    out, *kept = ops.nsa_attend(*arguments)
    torch.library.opcheck(ops.nsa_attend_backward, (torch.ones_like(out), *kept, *arguments))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_without_graph_breaks_also_as_self_attention(impl: Impl) -> None:
    s = Sparse.random(21, group=1, kv_heads=2, dtype=torch.float32)

    def attend(x: Tensor, lengths: Tensor) -> Tensor:
        return nsa.native_sparse_attention(
            x, x, x, gates=s.gates, **(s.sizes | {"lengths": lengths}), impl=impl
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([21, 4])
    found, expected = (s.q.clone().requires_grad_() for _ in range(2))
    compiled(found, lengths).square().sum().backward()
    attend(expected, lengths).square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("impl", ["auto", "native"])
def test_exports_with_a_dynamic_batch(impl: Impl) -> None:
    s = Sparse.random(21, dtype=torch.float32)

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
            return nsa.native_sparse_attention(q, k, v, gates=gates, **s.sizes, impl=impl)

    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Attend(), s.tensors, dynamic_shapes=(batch,) * 4)
    assert ("hashtab.nsa_attend" in str(program.graph)) == (impl == "native")
    for other in (Sparse.random(21, batch=n, dtype=torch.float32, seed=1) for n in (1, 5)):
        found = program.module()(*other.tensors)
        torch.testing.assert_close(found, other.attend(), **TOLERANCE[torch.float32])


@impls
def test_autocast_changes_no_bit(impl: Impl) -> None:
    s = Sparse.random(30, dtype=torch.float32)
    expected = s.attend(impl=impl), s.selected(impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = s.attend(impl=impl), s.selected(impl=impl)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_changes_no_bit_of_gradients() -> None:
    s = Sparse.random(30, dtype=torch.float32)
    expected = s.with_gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = s.with_gradients()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_the_number_of_threads_changes_no_bit() -> None:
    s = Sparse.random(100, batch=5, dtype=torch.float32)
    alone = s.with_gradients(impl="native")
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for found, expected in zip(s.with_gradients(impl="native"), alone, strict=True):
            assert torch.equal(found, expected)


@impls
def test_strided_arguments_are_read_right(impl: Impl) -> None:
    s = Sparse.random(30)
    q, k, v, gates = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in s.tensors)
    strided = s.but(q=q, k=k, v=v, gates=gates).with_gradients(impl=impl)
    torch.testing.assert_close(strided, s.with_gradients(impl=impl), **TOLERANCE[torch.float64])


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    s = Sparse.random(12)
    v = s.v.requires_grad_()
    out = s.but(q=v.repeat(1, 1, 2, 1)).attend()
    (grad,) = torch.autograd.grad(out.square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_blocks_that_do_not_exist_are_no_addresses() -> None:
    s = Sparse.random(21, dtype=torch.float32)
    compressed = [nsa.compress_mean(x, s.block, s.stride) for x in (s.k, s.v)]
    keys = [*compressed, s.k, s.v, s.k, s.v]
    arguments = (s.q, keys, s.gates, None, 0.3, 8, 4, 8, 2, 5, True)
    out, branches, log_sums, chosen = ops.nsa_attend(*arguments)
    for wrong in (chosen + 3, chosen - 2):
        with pytest.raises(ValueError, match=r"chosen blocks must lie within -1 \.\. 2"):
            ops.nsa_attend_backward(out, branches, log_sums, wrong, *arguments)
