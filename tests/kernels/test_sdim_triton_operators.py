"""SDIM's Triton kernels as programs use them: repeated, compiled, captured, with odd arguments."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hashtab.kernels import dense, sdim
from hashtab.kernels.sdim.api import Impl
from tests.kernels import fused
from tests.kernels.fence import Fence
from tests.kernels.fused import (
    DEVICE,
    GPU,
    Case,
    Operator,
    Recorder,
    assert_accurate,
    assert_same_bits,
    attend,
    attend_at,
    attend_last,
    candidates,
    draw,
    encode,
    encode_and_read,
    gradient_of,
    of_user,
    only,
    shorten_pieces,
    strided,
    upstream,
    with_gradient,
    with_queries,
)
from tests.kernels.histories import Histories

pytestmark = [pytest.mark.gpu] if GPU else []

SMALL = Case(torch.float32, 8, 3, 4)
LENGTHS = [33, 0, 70, 1, *([3000, 5000] if GPU else [])]
QUERIES = 3
NAMES = {
    f"sdim_fused_{name}{direction}"
    for name in ("encode", "read", "attend", "attend_at")
    for direction in ("", "_backward")
}

operators = pytest.mark.parametrize(
    "operator",
    [encode, encode_and_read, attend, attend_at, attend_last],
    ids=lambda f: f.__name__,
)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_pieces(monkeypatch, 32)


@pytest.fixture
def same_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "upstream", fused.same_for_users(QUERIES))


@pytest.mark.usefixtures("short_pieces", "same_upstream")
@operators
@pytest.mark.parametrize(
    ("dtype", "tau"),
    [(torch.float32, 3), (torch.float16, 6), *([(torch.bfloat16, 3)] if GPU else [])],
    ids=str,
)
def test_a_user_has_the_same_bits_twice_and_whoever_else_is_there(
    operator: Operator, dtype: torch.dtype, tau: int
) -> None:
    h = draw(LENGTHS, Case(dtype, 24, tau, 2), queries=QUERIES)
    together = operator(h, tau, "triton")
    assert_same_bits(operator(h, tau, "triton"), together)
    for user in range(len(LENGTHS)):
        assert_same_bits(of_user(h, user, together), operator(only(h, user), tau, "triton"))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.usefixtures("same_upstream")
@operators
def test_what_is_not_finite_stays_with_its_user(operator: Operator) -> None:
    h = draw([20, 30, 20], SMALL, queries=QUERIES)
    expected = operator(h, 3, "triton")
    h.values[22:25] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)[:, None]
    found = operator(h, 3, "triton")
    for user in (0, 2):
        assert_same_bits(of_user(h, user, found), of_user(h, user, expected))


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(("size", "groups"), [(8, 4), (256, 20)], ids=["hashed within", "before"])
def test_attend_gives_the_same_bits_where_nothing_is_kept(size: int, groups: int) -> None:
    h = draw([40, 0, 7], Case(torch.float32, size, 3, groups), queries=QUERIES)
    found = sdim.attend(h.values, h.offsets, candidates(h), h.planes, 3, impl="triton")
    assert torch.equal(found, attend(h, 3, "triton")[0])


def test_nothing_is_kept_for_a_backward_that_cannot_come() -> None:
    h = draw([40, 0, 7], SMALL, queries=QUERIES)
    for trained, gradients in ((False, True), (True, False), (True, True)):
        h.values.requires_grad_(trained)
        with Recorder() as recorder, torch.set_grad_enabled(gradients):
            sdim.attend(h.values, h.offsets, candidates(h), h.planes, 3, impl="triton")
        ((func, arguments),) = recorder.calls
        given = dict(zip((a.name for a in func._schema.arguments), arguments, strict=False))
        assert given["keep"] == (trained and gradients)


def test_operators_pass_opcheck() -> None:
    h, tau = draw([0, 5, 17], SMALL, queries=QUERIES), 3
    h = replace(h, values=h.values.t().contiguous().t())
    with Recorder() as recorder:
        for operator in (encode_and_read, attend, attend_at, attend_last):
            operator(h, tau, "triton")
        sdim.attend(h.values, h.offsets, candidates(h), h.planes, tau, impl="triton")
    assert {func._schema.name.split("::")[1] for func, _ in recorder.calls} == NAMES
    for func, arguments in recorder.calls:
        torch.library.opcheck(func, arguments)


def test_operators_pass_opcheck_with_groups_that_are_padded() -> None:
    h = draw([2, 17], Case(torch.float32, 8, 3, 33), queries=QUERIES)
    with Recorder() as recorder:
        attend_at(h, 3, "triton")
        attend(h, 3, "triton")
    for func, arguments in recorder.calls:
        torch.library.opcheck(func, arguments)


def test_operators_pass_opcheck_without_behaviours_or_candidates() -> None:
    case = Case(torch.float16, 8, 6, 2)
    with Recorder() as recorder:
        attend(draw([0, 0], case, queries=40), 6, "triton")
        attend_at(draw([0, 0], case, queries=40), 6, "triton")
        attend_at(with_queries([3, 2], [0, 0], case), 6, "triton")
    for func, arguments in recorder.calls:
        torch.library.opcheck(func, arguments)


def all_operators(values: Tensor, h: Histories, impl: Impl = "triton") -> Tensor:
    """Every differentiable operator, as a model would glue them."""
    queries = h.queries.view(3, -1, h.queries.shape[1])
    history, code = (values, h.offsets), (h.planes, 3)
    table = sdim.encode(*history, *code, impl=impl)
    at = (h.queries, h.query_offsets, h.cuts)
    return (
        sdim.read(table, queries, *code, impl=impl)
        + sdim.attend(*history, queries, *code, impl=impl)
    ).flatten(0, 1) + sdim.attend_at(*history, *at, *code, last=4, impl=impl)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_compiles_once_without_graph_breaks_forward_and_backward() -> None:
    compiled = torch.compile(all_operators, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths, queries, stance in (
        ([2, 5, 17], 5, "default"),
        ([9, 0, 30], 4, "fail_on_recompile"),
    ):
        h = draw(lengths, SMALL, queries=queries)
        with torch.compiler.set_stance(stance):
            assert_same_bits(gradient_of(compiled, h), gradient_of(all_operators, h))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
@pytest.mark.parametrize("impl", ["native", "triton"] if not GPU else ["triton"])
def test_one_tensor_in_several_places_compiles(impl: Impl) -> None:
    h = draw([2, 5, 17], SMALL)

    def own_past(values: Tensor, h: Histories) -> Tensor:
        cuts = torch.cat([torch.arange(n, device=DEVICE) for n in (2, 5, 17)])
        asked = (h.offsets, values, h.offsets, cuts)
        found = sdim.attend_at(values, *asked, h.planes, 3, impl=impl)
        return found + dense.target_attention_at(
            values, h.offsets, cuts, values, h.offsets, impl="triton"
        )

    compiled = torch.compile(own_past, fullgraph=True, backend="aot_eager")
    assert_same_bits(gradient_of(compiled, h), gradient_of(own_past, h))


@pytest.mark.parametrize("name", ["encode", "read", "attend", "attend_at"])
def test_candidates_and_planes_get_no_gradient(name: str) -> None:
    h = draw([2, 5, 17], SMALL)
    queries, planes = (x.requires_grad_() for x in (candidates(h), h.planes))
    flat = queries.flatten(0, 1)
    table = sdim.encode(h.values, h.offsets, planes, 3, impl="triton")
    interest = {
        "encode": lambda: table,
        "read": lambda: sdim.read(table, queries, planes, 3, impl="triton"),
        "attend": lambda: sdim.attend(h.values, h.offsets, queries, planes, 3, impl="triton"),
        "attend_at": lambda: sdim.attend_at(
            h.values, h.offsets, flat, h.query_offsets, h.cuts, planes, 3, impl="triton"
        ),
    }[name]()
    assert not interest.requires_grad


@pytest.mark.parametrize("name", ["encode", "read", "attend", "attend_at"])
def test_a_second_derivative_is_refused_rather_than_wrong(name: str) -> None:
    h = draw([0, 5, 17], SMALL)
    leaf, queries, code = h.values.requires_grad_(), candidates(h), (h.planes, 3)
    table = sdim.encode(leaf, h.offsets, *code, impl="triton")
    at = (h.queries, h.query_offsets, h.cuts)
    interest = {
        "encode": lambda: table,
        "read": lambda: sdim.read(table, queries, *code, impl="triton"),
        "attend": lambda: sdim.attend(leaf, h.offsets, queries, *code, impl="triton"),
        "attend_at": lambda: sdim.attend_at(leaf, h.offsets, *at, *code, impl="triton"),
    }[name]()
    leaf = table if name == "read" else leaf
    (grad,) = torch.autograd.grad(interest.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_autocast_changes_no_bit() -> None:
    h = draw([2, 5, 17], SMALL)
    expected = gradient_of(all_operators, h)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_same_bits(gradient_of(all_operators, h), expected)


@pytest.mark.parametrize(
    "name", ["values", "queries", "planes", "offsets", "query_offsets", "cuts"]
)
def test_strided_arguments_are_read_right(name: str) -> None:
    h = draw([2, 5, 17], SMALL)
    expected = gradient_of(all_operators, h)
    changed = replace(h, **{name: strided(getattr(h, name))})
    assert_same_bits(gradient_of(all_operators, changed), expected)
    if name in ("values", "queries", "planes"):
        turned = getattr(h, name).t().contiguous().t()
        assert_same_bits(gradient_of(all_operators, replace(h, **{name: turned})), expected)


def test_strided_tables_and_gradients_are_read_right() -> None:
    h = draw([2, 5, 17], SMALL)
    queries, code = candidates(h), (h.planes, 3)
    table = sdim.encode(h.values, h.offsets, *code)

    def read(table: Tensor) -> Tensor:
        return sdim.read(table, queries, *code, impl="triton")

    assert_same_bits(with_gradient(read, strided(table)), with_gradient(read, table))
    values = h.values.requires_grad_()
    at = (h.queries, h.query_offsets, h.cuts)
    for out in (
        sdim.encode(values, h.offsets, *code, impl="triton"),
        sdim.attend(values, h.offsets, queries, *code, impl="triton"),
        sdim.attend_at(values, h.offsets, *at, *code, impl="triton"),
    ):
        grad = upstream(out)
        wide, tight = (
            torch.autograd.grad(out, values, x, retain_graph=True) for x in (strided(grad), grad)
        )
        assert torch.equal(wide[0], tight[0])


MISFITS = [
    ("not float64", Case(torch.float64, 8, 3, 4)),
    ("D up to 256, got 257", Case(torch.float32, 257, 3, 1)),
    ("groups up to 64, got 65", Case(torch.float32, 8, 1, 65)),
    ("tau up to 10, got 11", Case(torch.float32, 8, 11, 1)),
]


@operators
@pytest.mark.parametrize(("reason", "case"), MISFITS, ids=[reason for reason, _ in MISFITS])
def test_what_kernels_are_not_for_is_refused_by_name(
    operator: Operator, reason: str, case: Case
) -> None:
    h = draw([3, 0, 2], case, queries=2)
    with pytest.raises(RuntimeError, match=f"impl='triton' cannot run: .*{reason}"):
        operator(h, case.tau, "triton")
    expected = operator(h, case.tau, "reference")
    for x, y in zip(operator(h, case.tau, "auto"), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("operator", [encode_and_read, attend, attend_at], ids=lambda f: f.__name__)
def test_queries_in_float64_are_refused_by_name(operator: Operator) -> None:
    h = draw([3, 0, 2], SMALL, queries=2)
    h = replace(h, queries=h.queries.double())
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: .*float64"):
        operator(h, 3, "triton")


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    h = draw([3], SMALL)
    h = replace(h, **{name: tensor.cpu() for name, tensor in vars(h).items()})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: tensors are on cpu"):
        encode(h, 3, "triton")


RIGHT: dict[str, list[int]] = {}
WRONG = [
    {"cuts": [-3, -1, 9, 21, 40, 0, 5, 12, 13, 60]},
    {"cuts": [20, 9, 0, 3, 1, 12, 5, 12, 0, 7]},
    *(
        {"offsets": bounds}
        for bounds in ([0, -5, 50], [40, 3, 1], [-30, 60, 32], [33, 34, 35], [0, 16, 50 - 2**32])
    ),
    *(
        {"query_offsets": bounds}
        for bounds in ([0, -5, 50], [40, 3, 1], [-9, 60, 10], [11, 12, 13], [0, 5, 40 - 2**32])
    ),
]


@pytest.mark.usefixtures("short_pieces")
@operators
@pytest.mark.parametrize("wrong", [RIGHT, *WRONG], ids=str)
def test_wrong_cuts_and_offsets_touch_nothing_outside(
    operator: Operator, wrong: dict[str, list[int]], fence: Fence
) -> None:
    for tau in (3, 6):
        h = draw([20, 12], SMALL._replace(tau=tau))
        h = replace(h, **{name: torch.tensor(x, device=DEVICE) for name, x in wrong.items()})
        h = replace(h, **{name: fence.around(tensor) for name, tensor in vars(h).items()})
        for x in operator(h, tau, "triton"):
            assert x.isfinite().all()
        fence.assert_whole()
        if not wrong:
            assert_accurate(h, tau, operator)
