"""What SDIM says it would run, and why."""

import re
from typing import Any

import pytest
import torch

from hashtab.kernels import sdim
from hashtab.kernels.core import dispatch


def explain(operator: Any, dtype: torch.dtype, tau: int, groups: int, **settings: Any) -> str:
    device = settings.pop("device", "cpu")
    rows = torch.empty(5, 8, dtype=dtype, device=device)
    planes = torch.empty(8, groups * tau, device=device)
    return sdim.explain(operator, rows, planes, tau, **settings)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings of tensors without memory that pass for those of a GPU."""
    monkeypatch.setattr(dispatch, "use_triton", lambda *_: True)
    monkeypatch.setattr(dispatch, "capability", lambda _: (9, 0))
    return {"device": "meta"}


def test_a_cpu_runs_native_code_and_the_definition_says_why_it_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert explain("attend_at", torch.float32, 3, 16).startswith("native: ")
    assert explain("attend_at", torch.float32, 3, 16, impl="reference") == "reference: asked for"
    monkeypatch.setattr("hashtab.kernels.core.native.why_not", lambda _: "no compiler")
    dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="no compiler"):
        assert explain("encode", torch.float32, 3, 16) == "reference: no compiler"


@pytest.mark.parametrize(
    ("dtype", "tau", "groups", "last", "said"),
    [
        (torch.bfloat16, 3, 16, None, "walks over each history"),
        (torch.bfloat16, 5, 9, 2000, "walks over each history"),
        (torch.bfloat16, 5, 9, 700, "masks .*latest 800 behaviours and more, got last=700"),
        (torch.float16, 3, 16, None, "masks .*bfloat16, not torch.float16"),
        (torch.bfloat16, 3, 8, None, "masks .*9 groups and more, got 8"),
        (torch.bfloat16, 6, 16, None, "masks .*up to 512 rows, got 1024"),
    ],
)
def test_queries_at_cuts_are_walked_to_where_walks_are_for_the_codes(
    hopper: dict[str, str], dtype: torch.dtype, tau: int, groups: int, last: int | None, said: str
) -> None:
    found = explain("attend_at", dtype, tau, groups, last=last, **hopper)
    assert re.match(f"triton: {said}", found), found


def test_many_groups_of_wide_rows_are_not_walked(hopper: dict[str, str]) -> None:
    rows = torch.empty(5, 160, dtype=torch.bfloat16, device=hopper["device"])
    found = sdim.explain("attend_at", rows, torch.empty(160, 32 * 3, device=hopper["device"]), 3)
    assert re.match("triton: masks .*up to 16 groups of D beyond 128, got 32", found), found


def test_many_candidates_are_read_from_a_table(hopper: dict[str, str]) -> None:
    few, many = (explain("attend", torch.bfloat16, 3, 16, candidates=n, **hopper) for n in (8, 9))
    assert few == "triton: one read of the behaviours, without a table"
    assert many == "triton: a table, for 9 candidates are more than its 8 buckets a group"


def test_what_cannot_run_is_refused_and_auto_says_what_kernels_are_not_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "why_not_triton", lambda _: None)
    with pytest.raises(RuntimeError, match="tau up to 10, got 11"):
        explain("encode", torch.float32, 11, 1, impl="triton")
    found = explain("encode", torch.float32, 11, 1, device="meta")
    assert found == "reference: kernels are for tau up to 10, got 11"
    with pytest.raises(ValueError, match="operator must be one of"):
        explain("decode", torch.float32, 3, 4)
