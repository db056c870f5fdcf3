"""Fused target attention: Triton's kernels against the definition in float64.

On a CPU kernels run interpreted, a tile in milliseconds, and bfloat16 products are wrong there: so
shapes are small and bfloat16 is for a GPU, where the same tests run whole.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hashtab.kernels import dense
from hashtab.kernels.dense import reference, tiling, triton
from tests.kernels.fence import Fence
from tests.kernels.fused import error, same_for_users, upstream, worst_row
from tests.kernels.histories import Histories, offsets_of
from tests.tolerances import TOLERANCE

ops: Any = torch.ops.hashtab

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
on_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device")
key_rows = pytest.mark.parametrize("shared", [True, False], ids=["values", "keys"])
FLOAT32_LIKE = 2e-6  # three TF32 products are not quite a float32 one
LARGE = [  # lengths, queries of each user, last
    ([0, 1, 2048, 63, 1000, 111, 2000], 320, None),
    ([0, 1, 2048, 63, 1000, 111, 2000], 320, 300),
    ([5000, 0, 1, 9000], 1, None),
    ([777] * 40, 16, None),
]
LENGTHS = [0, 1, 63, 0, 111, 0]


def draw(lengths: list[int], dtype: torch.dtype, **sizes: int) -> Histories:
    """Histories on the device of these tests."""
    h = Histories.random(lengths, dtype=dtype, **sizes)
    return replace(h, **{name: tensor.to(DEVICE) for name, tensor in vars(h).items()})


def keys_of(h: Histories, shared: bool) -> Tensor | None:
    return None if shared else h.values.roll(1, 0)


def attend(
    h: Histories, impl: dense.TargetImpl, keys: Tensor | None = None, last: int | None = None
) -> list[Tensor]:
    """Interest and gradients of queries, values and, unless they are the values, keys."""

    def interest(queries: Tensor, values: Tensor, *own_keys: Tensor) -> Tensor:
        rows = own_keys[0] if own_keys else None
        settings: dict[str, Any] = {"keys": rows, "last": last, "impl": impl}
        arguments = (queries, h.query_offsets, h.cuts, values, h.offsets)
        return dense.target_attention_at(*arguments, **settings)

    return with_gradients(interest, h.queries, h.values, *([] if keys is None else [keys]))


def with_gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream(out))]


def exactly(h: Histories, keys: Tensor | None, last: int | None) -> list[Tensor]:
    exact = replace(h, queries=h.queries.double(), values=h.values.double())
    return attend(exact, "reference", None if keys is None else keys.double(), last)


def plainly(h: Histories, keys: Tensor, last: int | None) -> list[Tensor]:
    """The definition in the dtype of the rows, as plain PyTorch computes it."""

    def interest(queries: Tensor, values: Tensor, keys: Tensor) -> Tensor:
        scale = queries.shape[1] ** -0.5
        return reference.target_attention_at(
            queries, h.query_offsets, h.cuts, keys, values, h.offsets, scale, last
        )

    return with_gradients(interest, h.queries, h.values, keys)


def assert_close(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, **TOLERANCE[dtype])


@pytest.mark.usefixtures("poisoned_memory")
@dtypes
@key_rows
@pytest.mark.parametrize(("size", "last"), [(24, None), (40, 1), (60, 50), (100, None)])
def test_agrees_with_the_definition(
    dtype: torch.dtype, shared: bool, size: int, last: int | None
) -> None:
    h = draw(LENGTHS, dtype, size=size, queries=20)
    keys = keys_of(h, shared)
    assert_close(attend(h, "triton", keys, last), exactly(h, keys, last), dtype)


@dtypes
@pytest.mark.parametrize("last", [None, 30])
def test_errs_at_most_twice_as_much_as_plain_pytorch(dtype: torch.dtype, last: int | None) -> None:
    h = draw([150, 0, 90], dtype, size=32, queries=20)
    keys = h.values.roll(1, 0)
    exact, plain = exactly(h, keys, last), plainly(h, keys, last)
    for x, y, z in zip(attend(h, "triton", keys, last), plain, exact, strict=True):
        assert error(x, z) <= max(2 * error(y, z), FLOAT32_LIKE)


CUT = tiling.Tiles(queries=16, behaviours=16, warps=4, stages=2)


@pytest.mark.usefixtures("poisoned_memory")
@key_rows
@pytest.mark.parametrize("last", [None, 1, 70])
@pytest.mark.parametrize(("splits", "queries", "behaviours"), [(1, 32, 16), (3, 16, 32)])
def test_any_cut_of_the_work_gives_the_same(
    shared: bool, last: int | None, splits: int, queries: int, behaviours: int
) -> None:
    h = draw([0, 40, 130, 0, 1], torch.float32, size=16, queries=20)
    keys = keys_of(h, shared)
    arguments = (h.queries, h.query_offsets, h.cuts, keys, h.values, h.offsets, 0.25, last)
    cut = replace(CUT, queries=queries, behaviours=behaviours, splits=splits)
    interest, log_sums = triton.attend_at(*arguments, cut)
    grad = upstream(interest)
    grads = triton.attend_at_backward(
        grad, interest, log_sums, *arguments, tiling.Backward(cut, cut)
    )
    found = [interest, grads[0], grads[2], *([] if shared else [grads[1]])]
    assert_close(found, exactly(h, keys, last), torch.float32)


def test_values_may_be_wider_or_narrower_than_keys() -> None:
    for size, value_size in ((8, 40), (40, 8)):
        h = draw([30, 0, 9], torch.float32, size=value_size)
        keys = draw([30, 0, 9], torch.float32, size=size, seed=1)
        h = replace(h, queries=keys.queries)
        assert_close(attend(h, "triton", keys.values), exactly(h, keys.values, None), torch.float32)


def with_queries(lengths: list[int], counts: list[int]) -> Histories:
    """Histories whose users have so many queries, at cuts that ascend from an empty view."""
    h = Histories.random(lengths, dtype=torch.float32, queries=max(counts, default=1) or 1)
    own = [
        torch.arange(n) * (length + 1) // max(n, 1)
        for n, length in zip(counts, lengths, strict=True)
    ]
    h = replace(
        h,
        queries=h.queries[: sum(counts)],
        query_offsets=offsets_of(counts),
        cuts=torch.cat([torch.arange(0), *own]),
    )
    return replace(h, **{name: tensor.to(DEVICE) for name, tensor in vars(h).items()})


def test_users_may_have_any_number_of_queries() -> None:
    h = with_queries([9, 0, 50, 5, 33, 1], [0, 17, 0, 1, 40, 0])
    assert_close(attend(h, "triton"), exactly(h, None, None), torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("lengths", "counts"), [([0, 0], [3, 1]), ([5, 40], [0, 0]), ([5], [1]), ([0], [0]), ([], [])]
)
def test_nothing_gives_nothing(lengths: list[int], counts: list[int]) -> None:
    h = with_queries(lengths, counts)
    for x in (*attend(h, "triton"), *attend(h, "triton", h.values * 2)):
        assert not x.any()


@key_rows
def test_the_same_bits_twice_and_whoever_else_is_there(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "upstream", same_for_users(5))
    h = draw([70, 33], torch.float32)
    twice = [attend(h, "triton", keys_of(h, shared)) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*twice, strict=True))
    alone = replace(
        h,
        values=h.values[70:],
        offsets=h.offsets[1:] - 70,
        queries=h.queries[5:],
        query_offsets=h.query_offsets[1:] - 5,
        cuts=h.cuts[5:],
    )
    together, single = attend(h, "triton"), attend(alone, "triton")
    for whole, part, before in zip(together, single, (5, 5, 70), strict=True):
        assert torch.equal(whole[before:], part)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter
def test_what_is_not_finite_stays_with_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "upstream", same_for_users(5))
    h = draw([20, 30, 20], torch.float32)
    expected = attend(h, "triton")
    h.values[22:25] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)[:, None]
    for found, before, own in zip(attend(h, "triton"), expected, (5, 5, 20), strict=True):
        assert torch.equal(found[:own], before[:own])
        assert torch.equal(found[-own:], before[-own:])


def test_wrong_cuts_and_offsets_touch_nothing_outside(fence: Fence) -> None:
    h = draw([20, 12], torch.float32)
    clamped = [0, 0, 9, 20, 20, 0, 5, 12, 12, 12]
    wrong = [-3, -1, 9, 21, 2**40, 0, 5, 12, 13, 2**31]
    found, expected = (
        attend(replace(h, cuts=torch.tensor(cuts, device=DEVICE)), "triton")
        for cuts in (wrong, clamped)
    )
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    for name in ("offsets", "query_offsets"):
        for bounds in ([0, -5, 500], [40, 3, 1], [-(2**40), 2**40, 2**41], [0, 5, 40 - 2**32]):
            off = replace(h, **{name: torch.tensor(bounds, device=DEVICE)})
            off = replace(off, **{key: fence.around(tensor) for key, tensor in vars(off).items()})
            for x in attend(off, "triton"):
                assert x.isfinite().all()  # what lies in margins is not
    fence.assert_whole()


def test_float64_and_other_misfits_are_named() -> None:
    h = draw([20, 12], torch.float64)
    rows = draw([20, 12], torch.float32)
    for reason, misfit in (
        ("all float16", h),
        ("all float16", replace(rows, queries=rows.queries.half())),
        (r"within 1 \.\. 256", draw([3], torch.float32, size=257)),
    ):
        with pytest.raises(RuntimeError, match=f"impl='triton' cannot run: .*{reason}"):
            attend(misfit, "triton")
        assert attend(misfit, "auto")[0].dtype == misfit.values.dtype
    asked = (rows.queries, rows.query_offsets, rows.cuts, rows.values, rows.offsets)
    with pytest.raises(RuntimeError, match="scale must be above 0 in float32"):
        dense.target_attention_at(*asked, scale=1e-50, impl="triton")
    assert dense.target_attention_at(*asked, scale=1e-50).isfinite().all()


@pytest.mark.usefixtures("poisoned_memory")
@dtypes
@key_rows
@pytest.mark.parametrize("candidates", [1, 17, 70])
def test_whole_histories_of_candidates(dtype: torch.dtype, shared: bool, candidates: int) -> None:
    h = draw([40, 0, 1, 128], dtype, size=24, queries=candidates)

    def interest(queries: Tensor, values: Tensor, *keys: Tensor, impl: dense.TargetImpl) -> Tensor:
        rows = keys[0] if keys else values
        return dense.target_attention(queries, values, h.offsets, keys=rows, impl=impl)

    queries = h.queries.view(4, candidates, -1)
    leaves = [queries, h.values, *([] if shared else [h.values.roll(1, 0)])]
    found = with_gradients(partial(interest, impl="triton"), *leaves)
    exact = (leaf.double() for leaf in leaves)
    assert_close(found, with_gradients(partial(interest, impl="reference"), *exact), dtype)


@pytest.mark.usefixtures("poisoned_memory")
@key_rows
@pytest.mark.parametrize("together", [CUT, replace(CUT, splits=3), None], ids=str)
def test_any_cut_of_the_work_gives_the_same_for_candidates(
    shared: bool, together: tiling.Tiles | None
) -> None:
    h = draw([40, 130, 0, 1], torch.float32, size=16, queries=3)
    keys = keys_of(h, shared)
    arguments = (h.queries, None, None, keys, h.values, h.offsets, 0.25, None)
    interest, log_sums = triton.attend_at(*arguments, replace(CUT, splits=2))
    grad = upstream(interest)
    grads = triton.attend_at_backward(
        grad, interest, log_sums, *arguments, tiling.Backward(CUT, CUT, together)
    )
    found = [interest, grads[0], grads[2], *([] if shared else [grads[1]])]
    whole = replace(h, cuts=h.offsets.diff().repeat_interleave(3))
    assert_close(found, exactly(whole, keys, None), torch.float32)


def test_huge_scores_do_not_overflow() -> None:
    h = draw([50], torch.float32)
    h.queries.mul_(1e4)
    h.values.mul_(1e3)
    assert all(x.isfinite().all() for x in attend(h, "triton"))


@key_rows
def test_operators_pass_opcheck(shared: bool) -> None:
    h = draw([0, 5, 17], torch.float32, queries=3)
    keys = None if shared else h.values.t().contiguous().t()
    arguments = (h.queries, h.query_offsets, h.cuts, keys, h.values, h.offsets, 0.3, 4)
    whole = (h.queries, None, None, keys, h.values, h.offsets, 0.3, None)
    upstream = torch.ones(8, 9, device=DEVICE).t()
    for inputs in (arguments, whole):
        torch.library.opcheck(ops.dense_fused_attend_at, inputs)
        forward = ops.dense_fused_attend_at(*inputs)
        torch.library.opcheck(ops.dense_fused_attend_at_backward, (upstream, *forward, *inputs))


@key_rows
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_compiles_without_graph_breaks_forward_and_backward(shared: bool) -> None:
    def interest(queries: Tensor, values: Tensor, h: Histories) -> Tensor:
        keys = values if shared else values * 2
        return dense.target_attention_at(
            queries, h.query_offsets, h.cuts, values, h.offsets, keys=keys, impl="triton"
        )

    compiled = torch.compile(interest, fullgraph=True, backend="aot_eager")
    for lengths in ([0, 5, 17], [8, 1, 30]):
        h = draw(lengths, torch.float32, queries=3)
        found, expected = (
            with_gradients(partial(function, h=h), h.queries, h.values)
            for function in (compiled, interest)
        )
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
@on_gpu
@dtypes
@key_rows
@pytest.mark.parametrize("size", [16, 64, 128, 256])
@pytest.mark.parametrize(("lengths", "queries", "last"), LARGE)
def test_large_shapes_agree_on_a_gpu(
    dtype: torch.dtype, shared: bool, size: int, lengths: list[int], queries: int, last: int | None
) -> None:
    h = draw(lengths, dtype, size=size, queries=queries)
    keys = keys_of(h, shared)
    found, exact = attend(h, "triton", keys, last), exactly(h, keys, last)
    plain = plainly(h, h.values if keys is None else keys, last)
    if keys is None:
        plain = [*plain[:2], plain[2] + plain[3]]
    for x, y, z in zip(found, plain, exact, strict=True):
        assert error(x, z) <= max(2 * error(y, z), FLOAT32_LIKE)
        # A user's only behaviour leaves a gradient of 0, the difference of two rounded products.
        assert worst_row(x, z) <= 2 * TOLERANCE[dtype]["rtol"]


@pytest.mark.gpu
@on_gpu
def test_runs_in_a_graph_on_another_stream() -> None:
    h = draw([300, 0, 700], torch.bfloat16, size=64, queries=70)
    expected = attend(h, "triton")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert all(torch.equal(*pair) for pair in zip(attend(h, "triton"), expected, strict=True))
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        captured = attend(h, "triton")
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


@pytest.mark.gpu
@on_gpu
def test_more_than_two_to_the_31_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_splits", lambda *_: 4)  # else as the size of a batch has it
    lengths = [2**31 // 128 + 5000, 3000]
    offsets = offsets_of(lengths).to(DEVICE)
    values = torch.zeros(sum(lengths), 128, dtype=torch.bfloat16, device=DEVICE)
    tail = torch.randn(8000, 128, device=DEVICE).bfloat16()
    values[-8000:] = tail
    queries = torch.randn(2, 128, device=DEVICE).bfloat16()
    cuts, query_offsets = offsets.diff(), torch.arange(3, device=DEVICE)

    def interest(queries: Tensor, values: Tensor, offsets: Tensor, cuts: Tensor) -> Tensor:
        return dense.target_attention_at(
            queries, query_offsets, cuts, values, offsets, last=3000, impl="triton"
        )

    found = with_gradients(partial(interest, offsets=offsets, cuts=cuts), queries, values)
    near = offsets_of([5000, 3000]).to(DEVICE)
    expected = with_gradients(partial(interest, offsets=near, cuts=near.diff()), queries, tail)
    assert torch.equal(found[2][-8000:], expected[2])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
