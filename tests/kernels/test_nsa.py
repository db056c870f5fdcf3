"""Native sparse attention: native code against the definition, and both against one loop."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from hashtab.kernels import nsa
from hashtab.kernels.core.dispatch import Impl
from tests.kernels.sparse import Sparse, by_loop, one_query
from tests.tolerances import TOLERANCE

EXACT = TOLERANCE[torch.float64]

impls = pytest.mark.parametrize("impl", ["reference", "native"])
both_ways = pytest.mark.parametrize("causal", [True, False])
few = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def cases(draw: st.DrawFn, tokens: int = 70) -> Sparse:
    """Sizes that fit nothing: tails, sequences within one block, groups of any size, padding."""
    length = draw(st.integers(1, tokens))
    block = draw(st.integers(1, 20))
    valid = draw(st.none() | st.lists(st.integers(0, length), min_size=2, max_size=2))
    return Sparse.random(
        length,
        group=draw(st.integers(1, 5)),
        kv_heads=draw(st.integers(1, 2)),
        size=draw(st.integers(1, 9)),
        value_size=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 99)),
        block=block,
        stride=draw(st.integers(1, block)),
        select_block=draw(st.integers(1, 20)),
        n_select=draw(st.integers(1, 6)),
        window=draw(st.integers(1, 30)),
        causal=draw(st.booleans()),
        lengths=None if valid is None else torch.tensor(valid),
    )


@pytest.mark.usefixtures("poisoned_memory")
@impls
@both_ways
@pytest.mark.parametrize(
    ("tokens", "group", "sizes"),
    [
        (1, 1, {}),
        (5, 3, {}),  # within a block
        (43, 2, {}),  # a tail
        (43, 1, {"block": 12, "stride": 12, "select_block": 10, "n_select": 3, "window": 7}),
        (40, 3, {"block": 7, "stride": 3, "select_block": 4, "n_select": 99, "window": 99}),
    ],
)
def test_agrees_with_one_query_after_the_other(
    impl: Impl, causal: bool, tokens: int, group: int, sizes: dict[str, Any]
) -> None:
    lengths = torch.tensor([tokens, tokens // 2])
    s = Sparse.random(tokens, group=group, value_size=6, causal=causal, lengths=lengths, **sizes)
    expected, blocks = by_loop(s)
    torch.testing.assert_close(s.attend(impl=impl), expected, **EXACT)
    found = s.selected(impl=impl).tolist()
    assert found == [
        [[[*row, *[-1] * (s.n_select - len(row))] for row in rows] for rows in sequence]
        for sequence in blocks
    ]


@few
@given(case=cases())
def test_native_code_gives_the_definition_its_gradients_and_its_choice(case: Sparse) -> None:
    native, reference = (case.with_gradients(impl=impl) for impl in ("native", "reference"))
    torch.testing.assert_close(native, reference, **EXACT)
    assert torch.equal(case.selected(impl="native"), case.selected(impl="reference"))


@few
@given(case=cases(tokens=40))
def test_all_blocks_selected_is_dense_attention(case: Sparse) -> None:
    gates = torch.zeros_like(case.gates)
    gates[..., 1] = 1
    case = case.but(gates=gates, n_select=40)
    lengths = torch.tensor([case.q.shape[1]] * 2) if case.lengths is None else case.lengths
    for b, length in enumerate(lengths.tolist()):
        q, k, v = (x[b : b + 1, :length].transpose(1, 2) for x in (case.q, case.k, case.v))
        dense = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=True
        )
        for impl in ("native", "reference"):
            found = case.attend(impl=impl)[b, :length]
            torch.testing.assert_close(found, dense[0].transpose(0, 1), **EXACT)


@few
@given(case=cases(tokens=50), more=st.integers(1, 30))
def test_padding_changes_nothing_whatever_it_holds(case: Sparse, more: int) -> None:
    tokens = case.q.shape[1]
    lengths = torch.tensor([tokens, tokens]) if case.lengths is None else case.lengths
    case = case.but(lengths=lengths)

    def padded(x: Tensor) -> Tensor:
        wide = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, more), value=9.0)
        padding = torch.arange(tokens + more) >= lengths[:, None]
        return wide.masked_fill(padding[..., None, None], 9.0)

    q, k, v, gates = map(padded, case.tensors)
    longer = case.but(q=q, k=k, v=v, gates=gates)
    for impl in ("native", "reference"):
        out, *grads = longer.with_gradients(impl=impl)
        expected = case.attend(impl=impl)
        torch.testing.assert_close(out[:, :tokens], expected, **EXACT)
        padding = torch.arange(tokens + more) >= lengths[:, None]
        assert not any(x[padding].any() for x in (out, *grads))


@few
@given(case=cases(tokens=50), cut=st.integers(1, 50))
def test_causal_attention_does_not_see_the_future(case: Sparse, cut: int) -> None:
    cut = min(cut, case.q.shape[1])
    case = case.but(causal=True, lengths=None)
    q, k, v, gates = (x[:, :cut] for x in case.tensors)
    for impl in ("native", "reference"):
        whole = case.attend(impl=impl)[:, :cut]
        alone = case.but(q=q, k=k, v=v, gates=gates).attend(impl=impl)
        torch.testing.assert_close(whole, alone, **EXACT)


@impls
@both_ways
def test_a_sequence_has_the_same_bits_alone_as_among_others(impl: Impl, causal: bool) -> None:
    s = Sparse.random(37, batch=3, causal=causal, lengths=torch.tensor([37, 20, 0]))
    together = s.attend(impl=impl)
    for b in range(3):
        q, k, v, gates = (x[b : b + 1] for x in s.tensors)
        assert s.lengths is not None
        alone = s.but(q=q, k=k, v=v, gates=gates, lengths=s.lengths[b : b + 1]).attend(impl=impl)
        torch.testing.assert_close(alone[0], together[b], **EXACT)
        assert impl == "reference" or torch.equal(alone[0], together[b])


@impls
@both_ways
@pytest.mark.parametrize("group", [1, 3])
def test_gradcheck(impl: Impl, causal: bool, group: int) -> None:
    lengths = torch.tensor([7, 4])
    sizes: dict[str, Any] = {"block": 3, "stride": 2, "select_block": 2, "n_select": 2, "window": 2}
    s = Sparse.random(
        7, group=group, kv_heads=1, size=2, value_size=2, causal=causal, lengths=lengths, **sizes
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return s.but(q=q, k=k, v=v, gates=gates).attend(impl=impl)

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in s.tensors])


@impls
def test_own_keys_for_each_branch_and_compression_from_outside(impl: Impl) -> None:
    s, other = Sparse.random(30), Sparse.random(30, seed=1)
    names = ("k", "v", "k_window", "v_window", "k_compressed", "v_compressed")
    compressed = [nsa.compress_mean(x, s.block, s.stride) for x in (other.k, other.v)]
    given = (s.k, s.v, other.v, other.k, *compressed)

    def branches(*tensors: Tensor) -> Tensor:
        at = dict(zip(names, tensors, strict=True))
        keys, values = (at["k"], at["k_window"]), (at["v"], at["v_window"])
        more: dict[str, Any] = {name: at[name] for name in names[4:]}
        return nsa.native_sparse_attention(
            s.q, keys, values, gates=s.gates, **s.sizes, **more, impl=impl
        )

    def only(branch: int) -> Tensor:
        return s.gates * torch.nn.functional.one_hot(torch.tensor(branch), 3)

    expected = (
        other.but(q=s.q, gates=only(0)).attend()
        + s.but(gates=only(1)).attend(k_compressed=compressed[0])
        + s.but(k=other.v, v=other.k, gates=only(2)).attend()
    )
    torch.testing.assert_close(branches(*given), expected, **EXACT)
    leaves = [x[:1, : 3 if i > 3 else 7].clone().requires_grad_() for i, x in enumerate(given)]
    small = {"q": s.q[:1, :7], "gates": s.gates[:1, :7]}
    s = s.but(**small, block=3, stride=2, select_block=2)
    assert torch.autograd.gradcheck(branches, leaves)


@impls
def test_equal_blocks_are_chosen_by_position(impl: Impl) -> None:
    s = Sparse.random(70, dtype=torch.float32, n_select=4, stride=8)
    # Equal keys tie but for rounding, which depends on the order of sums.
    chosen = s.but(k=torch.full_like(s.k, 0.1)).selected(impl=impl)
    for t, own in ((0, 0), (30, 3), (69, 8)):
        expected = [own, *(j for j in range(9) if j != own)][:4]
        assert (chosen[:, t] == torch.tensor(expected)).all()


def test_the_most_important_blocks_are_selected() -> None:
    s = Sparse.random(50, n_select=3)
    sizes = s.sizes
    del sizes["window"], sizes["n_select"]
    shares = nsa.importance(s.q, s.k, **sizes)
    assert shares.shape == (2, 50, 2, 7)
    chosen = s.selected()
    own = torch.arange(50)[:, None] // s.select_block
    assert (chosen[..., 0] == own).all()
    rest = shares.scatter(3, chosen[..., :1], -1)
    assert torch.equal(chosen[..., 1:], rest.topk(2).indices)


def test_the_reported_blocks_are_those_that_the_result_depends_on() -> None:
    s = Sparse.random(40, kv_heads=1, group=1, n_select=2)
    gates = torch.zeros_like(s.gates)
    gates[..., 1] = 1
    v = s.v.requires_grad_()
    out = s.but(gates=gates).attend()
    for t in (0, 13, 39):
        (grad,) = torch.autograd.grad(out[0, t].sum(), v, retain_graph=True)
        used = grad[0].abs().sum((1, 2)).nonzero().flatten() // s.select_block
        assert set(used.tolist()) == set(s.selected()[0, t, 0].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both_ways
def test_low_precision_is_summed_in_float32(dtype: torch.dtype, causal: bool) -> None:
    s = Sparse.random(50, size=16, value_size=16, causal=causal, dtype=dtype)
    out, *grads = s.with_gradients()
    assert out.dtype == dtype
    expected = by_loop(s)[0]
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    q, k, v, gates = (x.double() for x in s.tensors)
    wide = s.but(q=q, k=k, v=v, gates=gates).with_gradients()[1:]
    for found, exact in zip(grads, wide, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, **TOLERANCE[dtype])


def test_large_scores_do_not_overflow() -> None:
    s = Sparse.random(40, dtype=torch.float32)
    s = s.but(q=s.q * 100, k=s.k * 100)
    for impl in ("native", "reference"):
        results = s.with_gradients(impl=impl)
        assert all(x.isfinite().all() for x in results)


def test_a_long_sequence_is_computed_right() -> None:
    s = Sparse.random(
        8192, batch=1, group=1, kv_heads=1, dtype=torch.float32, block=16, stride=16, n_select=4
    )
    out, *grads = s.with_gradients(impl="native")
    blocks = nsa.blocks(8192, s.block, s.stride).tolist()
    for t in (0, 4000, 8191):
        of_query = (s.q[0, t].double(), s.k[0, :, 0].double(), s.v[0, :, 0].double())
        expected, _ = one_query(s, t, blocks, *of_query, s.gates[0, t].double())
        torch.testing.assert_close(out[0, t].double(), expected, **TOLERANCE[torch.float32])
    assert all(grad.isfinite().all() for grad in grads)


def test_nothing_is_seen_before_the_first_block_ends() -> None:
    s = Sparse.random(20, causal=True, block=8, stride=4)
    gates = torch.zeros_like(s.gates)
    gates[..., 0] = 1
    for impl in ("native", "reference"):
        out, q, k, v, _ = s.but(gates=gates).with_gradients(impl=impl)
        assert not out[:, :7].any()
        assert not q[:, :7].any()
        assert out[:, 7:].all()
        # Positions 16 .. 19 lie in block 4, which ends at 19, and in a partial one.
        assert k.isfinite().all()
        assert v.isfinite().all()


def test_blocks_cover_all_positions() -> None:
    for tokens, block, stride in ((1, 16, 8), (16, 16, 8), (17, 16, 8), (100, 12, 5), (9, 3, 3)):
        rows = nsa.blocks(tokens, block, stride)
        held = {t for begin, end in rows.tolist() for t in range(begin, end)}
        assert held == set(range(tokens))
        assert (rows.diff(dim=1) > 0).all()
        if tokens >= block:
            assert (rows[:-1].diff(dim=1) == block).all()


@pytest.mark.parametrize(("block", "stride"), [(8, 4), (7, 3), (5, 5), (1, 1), (99, 50)])
def test_means_and_members_are_of_each_block(block: int, stride: int) -> None:
    k = Sparse.random(30).k
    lengths = torch.tensor([30, 11])
    means = nsa.compress_mean(k, block, stride, lengths)
    members = nsa.block_members(k, block, stride)
    rows = nsa.blocks(30, block, stride)
    assert means.shape[1] == members.shape[1] == len(rows)
    for i, (begin, end) in enumerate(rows.tolist()):
        assert torch.equal(members[:, i, : end - begin], k[:, begin:end])
        assert not members[:, i, end - begin :].any()
        for b, length in enumerate(lengths.tolist()):
            held = k[b, begin : min(end, length)]
            expected = held.mean(0) if len(held) else torch.zeros_like(k[b, 0])
            torch.testing.assert_close(means[b, i], expected, **EXACT)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block": 0}, "block must be at least 1, got block=0"),
        ({"stride": 9}, "stride must lie within 1 .. block, got stride=9, block=8"),
        ({"stride": 0}, "got stride=0"),
        ({"select_block": 0}, "select_block must be at least 1, got select_block=0"),
        ({"n_select": 0}, "n_select must be at least 1, got n_select=0"),
        ({"window": -1}, "window must be at least 1, got window=-1"),
        ({"lengths": torch.tensor([11, 1])}, r"within 0 .. 10, got \[11\]"),
        ({"lengths": torch.tensor([1])}, r"lengths must be \[B\] for B = 2"),
        ({"k": torch.zeros(2, 9, 2, 4)}, "q and k must agree in B and T"),
        ({"k": torch.zeros(2, 10, 2, 5)}, "with D = 4"),
        ({"k": torch.zeros(2, 10, 3, 4)}, "H must be a multiple of Hkv, got H = 4, Hkv = 3"),
        ({"v": torch.zeros(2, 10, 1, 4)}, "k and v must agree"),
        ({"v": (torch.zeros(2, 10, 2, 4),) * 3}, "v must be a tensor or two, got 3"),
        ({"k": (torch.zeros(2, 10, 2, 4), torch.zeros(2, 10, 1, 4))}, "k of selection and of"),
        ({"gates": torch.zeros(2, 10, 4, 2)}, r"gates must be \[B, T, H, 3\]"),
        ({"gates": torch.zeros(2, 10, 2, 3)}, r"gates must be \[B, T, H, 3\] for the q"),
        ({"k_compressed": torch.zeros(2, 3, 2, 4)}, "for each of the 2 blocks of block=8"),
        ({"v_compressed": torch.zeros(2, 1, 2, 4)}, "v_compressed must be"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_wrong_values(changed: dict[str, Any], message: str) -> None:
    s = Sparse.random(10, dtype=torch.float32)
    arguments = {"q": s.q, "k": s.k, "v": s.v, "gates": s.gates} | s.sizes
    with pytest.raises(ValueError, match=message):
        nsa.native_sparse_attention(**(arguments | changed))


def test_no_positions_are_refused_and_no_sequences_are_not() -> None:
    with pytest.raises(ValueError, match="at least 1 position, got T = 0"):
        Sparse.random(0).attend()
    for impl in ("native", "reference"):
        empty = Sparse.random(5, batch=0)
        assert empty.attend(impl=impl).shape == (0, 5, 4, 4)
        assert empty.selected(impl=impl).shape == (0, 5, 2, 2)
