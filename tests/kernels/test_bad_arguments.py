"""Arguments that cannot be right are refused by name and value."""

from typing import Any

import pytest
import torch

from hashtab.kernels import dense, sdim
from hashtab.kernels.core import to_ragged
from tests.kernels.histories import Histories

H = Histories.random([4, 6], queries=2)


def call(operator: str, **changed: Any) -> None:
    arguments: dict[str, Any] = {
        "values": H.values,
        "offsets": H.offsets,
        "queries": H.queries,
        "query_offsets": H.query_offsets,
        "cuts": torch.tensor([1, 3, 0, 6]),
    }
    if operator == "sdim":
        arguments |= {"planes": H.planes, "tau": 3}
        sdim.attend_at(**(arguments | changed))
    else:
        dense.target_attention_at(**(arguments | changed))


both = pytest.mark.parametrize("operator", ["sdim", "dense"])


@both
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offsets": torch.tensor([1, 4, 10])}, "offsets must start at 0.*got first 1"),
        ({"offsets": torch.tensor([0, 4, 9])}, "number of behaviours, 10;.*last 9"),
        ({"offsets": torch.tensor([0, 11, 10])}, "ascend.*smallest step -1"),
        ({"offsets": H.offsets[:0], "query_offsets": H.offsets[:0]}, "begin with 0, got none"),
        ({"query_offsets": H.offsets[:0]}, r"query_offsets must be \[B \+ 1\].*got none"),
        ({"offsets": torch.tensor([0, 10])}, r"\[B \+ 1\] for the B = 2 users"),
        ({"query_offsets": torch.tensor([0, 2, 3])}, "query_offsets.*number of queries, 4"),
        ({"cuts": torch.tensor([1, 5, 0, 6])}, r"cuts\[1\] = 5 for user 0 with 4 behaviours"),
        ({"cuts": torch.tensor([1, 2, -1, 6])}, r"cuts\[2\] = -1"),
        ({"cuts": torch.tensor([3, 1, 0, 6])}, r"ascend within a user, got cuts\[1\] = 1 after 3"),
        ({"cuts": torch.tensor([1, 3, 0])}, "one entry for each of the 4 queries, got 3"),
        ({"queries": torch.zeros(4, 8, 1)}, r"queries must be \[Q, D\]"),
        ({"offsets": H.offsets[:1], "query_offsets": H.offsets[:1]}, "of no user, got 4 queries"),
        ({"last": 0}, "last must be at least 1, got last=0"),
        ({"last": 2**63}, r"last must be below 2\*\*63 \(None is for all"),
        ({"impl": "fast"}, "impl must be one of .*got impl='fast'"),
    ],
)
def test_wrong_values(operator: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(operator, **changed)


@both
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offsets": H.offsets.float()}, "offsets must be int64, got torch.float32"),
        ({"query_offsets": H.query_offsets.int()}, "query_offsets must be int64"),
        ({"cuts": torch.tensor([1.0, 3, 0, 6])}, "cuts must be int64, got torch.float32"),
        ({"values": H.values.long()}, "values must be floating point, got torch.int64"),
        ({"last": 2.5}, "last must be an int or None, got last=2.5"),
    ],
)
def test_wrong_types(operator: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(operator, **changed)


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        (5, "tau must divide the number of planes, got tau=5, M=12"),
        (17, "got tau=17"),
        (0, "tau=0"),
    ],
)
def test_tau(tau: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call("sdim", tau=tau)


def test_tau_is_an_int() -> None:
    with pytest.raises(TypeError, match=r"tau must be an int, got tau=3\.0"):
        call("sdim", tau=3.0)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_scale(scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale must be at least 0 and finite, got {scale=}"):
        call("dense", scale=scale)
    with pytest.raises(ValueError, match="scale must be at least 0"):
        dense.target_attention(H.queries.view(2, 2, 8), H.values, H.offsets, scale=scale)


def test_vectors_of_no_size() -> None:
    with pytest.raises(ValueError, match=r"queries must be .* D of at least 1, got \(4, 0\)"):
        call("dense", queries=torch.zeros(4, 0), values=torch.zeros(10, 0))
    with pytest.raises(ValueError, match=r"planes must be .* D of at least 1, got \(0, 12\)"):
        call("sdim", queries=torch.zeros(4, 0), values=torch.zeros(10, 0), planes=H.planes[:0])
    q = torch.zeros(2, 3, 1, 0)
    with pytest.raises(ValueError, match=r"q must be .* D of at least 1, got \(2, 3, 1, 0\)"):
        dense.window_attention(q, q, torch.zeros(2, 3, 1, 4), window=2, causal=True)


def test_offsets_without_a_number() -> None:
    with pytest.raises(ValueError, match=r"offsets must be \[B \+ 1\] and begin with 0, got none"):
        sdim.encode(H.values, H.offsets[:0], H.planes, 3)
    with pytest.raises(ValueError, match="begin with 0, got none"):
        dense.target_attention(H.queries.view(2, 2, 8), H.values, H.offsets[:0])


def test_tables_of_another_shape_or_type() -> None:
    queries = H.queries.view(2, 2, 8)
    with pytest.raises(ValueError, match=r"table must be .*\(2, 4, 8, 8\), got \(2, 6, 4, 8\)"):
        sdim.read(torch.zeros(2, 6, 4, 8), queries, H.planes, 3)
    with pytest.raises(TypeError, match=r"table must be float32 or float64, got torch\.float16"):
        sdim.read(torch.zeros(2, 4, 8, 8).half(), queries, H.planes, 3)


def test_keys_of_another_length() -> None:
    with pytest.raises(ValueError, match="one row for each behaviour, got 3 and 10"):
        call("dense", keys=torch.zeros(3, 8))


def test_lengths_beyond_the_padding() -> None:
    with pytest.raises(ValueError, match=r"within 0 .. 3, got \[4\]"):
        to_ragged(torch.zeros(2, 3, 1), torch.tensor([4, 1]))
    with pytest.raises(TypeError, match="lengths must be int64"):
        to_ragged(torch.zeros(2, 3, 1), torch.tensor([3.0, 1.0]))
