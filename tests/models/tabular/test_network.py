"""What networks side by side, tokens, attention, gates and members promise."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from hashtab.models.tabular.blocks import ColumnAttention, TabNSABlock
from hashtab.models.tabular.embedding import Encoded
from hashtab.models.tabular.network import TabNSANetwork
from hashtab.models.tabular.order import correlation_order
from hashtab.models.tabular.settings import NetworkSettings, SizedSettings
from tests.tolerances import TOLERANCE

FLOAT32 = TOLERANCE[torch.float32]
LEVELS = (3, 2)
NUMERIC = 3
ROWS = 7

variants = pytest.mark.parametrize(
    "changed",
    [
        {},
        {"attention": "dense", "fusion": "gate", "blocks": 2},
        {"attention": "sparse", "block": 2, "window": 1},
        {"attention": "dense", "mixer": False},
        {"members": 3, "readout": "mean"},
        {"numeric": "periodic"},
        {"numeric": "linear", "columns": "shared"},
        {"blocks": 0},
    ],
    ids=str,
)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def settings(**changed: Any) -> SizedSettings:
    small = {"width": 8, "mixer_width": 8, "readout_width": 8, "dropout": 0.0}
    return NetworkSettings(**(small | changed)).sized(ROWS)


def rows(networks: int = 1, count: int = ROWS) -> Encoded:
    place = torch.rand(networks, NUMERIC, count) * 8
    codes = torch.stack([torch.randint(n + 2, (networks, count)) for n in LEVELS], 1)
    return Encoded(torch.randn(networks, NUMERIC, count), place, place < 1, codes)


def network(count: int, **changed: Any) -> TabNSANetwork:
    made = TabNSANetwork(count, NUMERIC, LEVELS, 2, settings(**changed))
    for parameter in made.parameters():
        # Away from the start, where bins and unseen categories count for nothing.
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def one_of(made: TabNSANetwork, index: int, **changed: Any) -> TabNSANetwork:
    alone = network(1, **changed)
    parts = {k: v[index : index + 1] for k, v in made.named_parameters()}
    alone.load_state_dict(alone.state_dict() | parts)
    return alone


@variants
def test_networks_side_by_side_are_networks_alone(changed: dict[str, Any]) -> None:
    three, x = network(3, **changed), rows(3)
    together = three(x)
    assert together.shape == (3, changed.get("members", 1), ROWS, 2)
    together.square().sum().backward()
    for i in range(3):
        alone = one_of(three, i, **changed)
        answers = alone(Encoded(*(part[i : i + 1] for part in x)))
        torch.testing.assert_close(answers[0], together[i], rtol=1e-4, atol=1e-5)
        answers.square().sum().backward()
        parameters = zip(alone.named_parameters(), three.parameters(), strict=True)
        for (name, a), b in parameters:
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(a.grad[0], b.grad[i], rtol=1e-3, atol=1e-4)


@variants
def test_all_networks_may_read_the_same_rows(changed: dict[str, Any]) -> None:
    made, x = network(2, **changed), rows()
    twice = Encoded(*(part.expand(2, -1, -1) for part in x))
    torch.testing.assert_close(made(x), made(twice), rtol=1e-4, atol=1e-5)


@variants
def test_a_row_does_not_depend_on_other_rows(changed: dict[str, Any]) -> None:
    made, x = network(2, **changed), rows()
    some = made(Encoded(*(part[..., 2:4] for part in x)))
    torch.testing.assert_close(made(x)[:, :, 2:4], some, rtol=1e-4, atol=1e-5)


@variants
def test_no_rows_give_no_answers(changed: dict[str, Any]) -> None:
    answers = network(2, **changed)(rows(count=0))
    assert answers.shape == (2, changed.get("members", 1), 0, 2)


def test_equal_columns_have_tokens_of_their_own() -> None:
    tokens = TabNSANetwork(1, NUMERIC, LEVELS, 2, settings()).tokens
    x = rows()
    same = Encoded(*(part[:, :1].expand_as(part) for part in x))._replace(codes=x.codes)
    out = tokens(same)
    for i in range(1, NUMERIC):
        assert not torch.isclose(out[:, 0], out[:, i]).all(-1).any()
    nothing = x._replace(codes=torch.ones_like(x.codes))  # both categories are missing
    out = tokens(nothing)
    assert not torch.allclose(out[:, NUMERIC], out[:, NUMERIC + 1])


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize(("seen", "seer"), [(0, 39), (39, 0)])
def test_attention_reaches_both_ways(
    kind: Literal["dense", "sparse"], seen: int, seer: int
) -> None:
    layer = ColumnAttention(1, 40, settings(attention=kind, block=4, window=2, selected=1))
    x = torch.randn(1, 40, 1, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0, seer].sum(), x)
    assert grad[0, seen].abs().sum() > 0


def test_sparse_attention_over_one_block_sees_what_dense_does() -> None:
    # With one block all are selected; with the other branches closed it is plain attention.
    sparse = ColumnAttention(1, 6, settings(attention="sparse", block=8))
    dense = ColumnAttention(1, 6, settings(attention="dense"))
    dense.load_state_dict(
        {k: v for k, v in sparse.state_dict().items() if not k.startswith("gates")}
    )
    with torch.no_grad():
        sparse.gates.weight.zero_()
        sparse.gates.bias.copy_(torch.tensor([-99.0, 99.0, -99.0]).repeat(2))
    x = torch.randn(1, 6, ROWS, 8)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-3, atol=1e-4)


def test_the_gate_begins_as_the_sum() -> None:
    summed = TabNSABlock(2, 5, settings(attention="dense"))
    gated = TabNSABlock(2, 5, settings(attention="dense", fusion="gate"))
    gated.load_state_dict(summed.state_dict(), strict=False)
    x = torch.randn(2, 5, ROWS, 8)
    torch.testing.assert_close(gated(x), summed(x), **FLOAT32)
    assert gated.gate is not None
    with torch.no_grad():
        gated.gate[:, 0] = -99  # of attention
        gated.gate[:, 1] = -99
    torch.testing.assert_close(gated(x), x, **FLOAT32)


def test_members_differ() -> None:
    answers = TabNSANetwork(1, NUMERIC, LEVELS, 2, settings(members=4))(rows())[0]
    for i in range(1, 4):
        assert not torch.isclose(answers[0], answers[i]).any()


@pytest.mark.parametrize(
    ("columns", "readout", "flat"),
    [(256, "auto", True), (257, "auto", False), (257, "flatten", True), (2, "mean", False)],
)
def test_few_features_are_read_one_by_one(
    columns: int, readout: Literal["auto", "flatten", "mean"], flat: bool
) -> None:
    made = settings(width=16, readout=readout, readout_width=2, mixer=False)
    readout_layer = TabNSANetwork(1, columns, (), 1, made).readout
    assert readout_layer.linear.weight.shape[1] == (16 * columns if flat else 16)


def test_columns_are_ordered_by_what_the_whole_table_shows() -> None:
    # In the first rows column 0 goes with 1, in the most with 2.
    values = torch.randn(3, 9000)
    values[1, :3000], values[2, 3000:] = values[0, :3000], values[0, 3000:]
    none = torch.zeros(1, 0, 9000, dtype=torch.int64)
    order = correlation_order(Encoded(values[None], values[None], values[None] > 9, none)).tolist()
    assert abs(order.index(0) - order.index(2)) == 1
    assert order[-1] == 1


def test_wide_tables_are_read_in_fewer_rows_at_once() -> None:
    narrow, wide = (TabNSANetwork(8, n, (), 1, settings(mixer=False)) for n in (10, 20_000))
    assert narrow.rows_at_once() > 500
    assert 1 <= wide.rows_at_once() < 20


def test_dropout_keeps_the_mean_and_is_off_after_training() -> None:
    from hashtab.models.tabular.stacked import Dropout

    layer, x = Dropout(0.25), torch.ones(400, 1000)
    dropped = layer(x)
    zeros: Tensor = (dropped == 0).float().mean()
    assert abs(float(zeros) - 0.25) < 0.01
    assert abs(float(dropped.mean()) - 1) < 0.01
    assert torch.equal(layer.eval()(x), x)
