"""The hash: one rule, whatever the batch, the mode and the precision around it."""

import doctest
import subprocess
import sys

import pytest
import torch

from hashtab.kernels import sdim
from hashtab.kernels.core.dispatch import Impl
from hashtab.kernels.sdim import api
from tests.kernels.histories import Histories

impls = pytest.mark.parametrize("impl", ["reference", "native"])


def test_the_examples_of_the_documentation() -> None:
    failed, tried = doctest.testmod(api, extraglobs={"torch": torch})
    assert (failed, tried) == (0, 1)


@impls
def test_lowest_bit_first_and_strictly_positive(impl: Impl) -> None:
    x = torch.tensor([[1.0, -1.0, 2.0, 0.0], [-1.0, 1.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    found = sdim.codes(x, torch.eye(4), 2, impl=impl)
    assert found.dtype == torch.int32
    assert found.tolist() == [[1, 1], [2, 2], [0, 0]]


@impls
@pytest.mark.parametrize(("tau", "planes"), [(1, 7), (3, 48), (5, 80), (16, 48)])
def test_codes_are_the_signature_in_groups(impl: Impl, tau: int, planes: int) -> None:
    h = Histories.random([257], size=40, planes=planes, dtype=torch.float32)
    bits = (h.values.double() @ h.planes.double() > 0).view(257, planes // tau, tau).long()
    expected = (bits << torch.arange(tau)).sum(-1)
    assert torch.equal(sdim.codes(h.values, h.planes, tau, impl=impl).long(), expected)


def test_any_leading_shape() -> None:
    x = torch.randn(2, 3, 5, 8)
    planes = torch.randn(8, 6)
    found = sdim.codes(x, planes, 2)
    assert found.shape == (2, 3, 5, 3)
    assert torch.equal(found[1, 2, 4], sdim.codes(x[1, 2, 4], planes, 2))
    assert sdim.codes(x[:0], planes, 2).shape == (0, 3, 5, 3)


@impls
def test_a_row_alone_has_the_codes_it_has_among_others(impl: Impl) -> None:
    h = Histories.random([333], size=60, planes=80, dtype=torch.float32)
    together = sdim.codes(h.values, h.planes, 5, impl=impl)
    alone = torch.cat([sdim.codes(row[None], h.planes, 5, impl=impl) for row in h.values])
    assert torch.equal(together, alone)


def test_vectors_on_a_plane_but_for_rounding_hash_alike() -> None:
    h = Histories.random([4000], size=32, planes=80, dtype=torch.float32)
    values, normals = h.values.double(), h.planes.double()[:, torch.arange(4000) % 80].T
    along = (values * normals).sum(1, keepdim=True) / normals.square().sum(1, keepdim=True)
    on_plane = (values - along * normals).float()
    expected = sdim.codes(on_plane, h.planes, 5, impl="reference")
    assert torch.equal(sdim.codes(on_plane, h.planes, 5, impl="native"), expected)


@impls
def test_autocast_does_not_change_codes(impl: Impl) -> None:
    h = Histories.random([2000], size=32, planes=80, dtype=torch.float32)
    expected = sdim.codes(h.values, h.planes, 5, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sdim.codes(h.values, h.planes, 5, impl=impl), expected)


def test_reduced_matmul_precision_does_not_change_codes_and_stays_set() -> None:
    code = (
        "import torch\n"
        "from hashtab.kernels import sdim\n"
        "x, planes = torch.randn(2000, 32), torch.randn(32, 80)\n"
        "before = sdim.codes(x, planes, 5, impl='reference')\n"
        "torch.set_float32_matmul_precision('medium')\n"
        "after = sdim.codes(x, planes, 5, impl='reference')\n"
        "assert torch.equal(before, after)\n"
        "assert torch.get_float32_matmul_precision() == 'medium'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_half_precision_is_hashed_as_stored() -> None:
    x = torch.randn(500, 32).bfloat16()
    planes = torch.randn(32, 48)
    assert torch.equal(sdim.codes(x, planes, 3), sdim.codes(x.float(), planes, 3))


def test_codes_carry_no_gradient() -> None:
    h = Histories.random([10])
    values, queries = h.values.requires_grad_(), h.queries.requires_grad_()
    assert not sdim.codes(values, h.planes, 3).requires_grad
    interest = sdim.attend_at(values, h.offsets, queries, h.query_offsets, h.cuts, h.planes, 3)
    interest.sum().backward()
    assert values.grad is not None
    assert queries.grad is None
