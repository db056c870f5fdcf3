"""Items to rows and features: the same whatever type a request has its items in."""

import numpy as np
import polars as pl
import pytest

from hashtab.features.catalogue import UNKNOWN_ROW, Catalogue

NUMBERS = Catalogue(
    pl.Series([-3, 7, 40]),
    {
        "item": np.array([1, 2, 3], np.int32),
        "kind": np.array([1, 5, 5], np.int32),
        "size": np.array([0.5, -1.0, 2.0], np.float32),
    },
    "item",
)
TEXTS = Catalogue(pl.Series(["10", "9", "b"]), {"item": np.array([2, 3, 4], np.int32)}, "item")


@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        (pl.Series([40, 8, -3, None, 7, 41, -4]), [2, -1, 0, -1, 1, -1, -1]),
        (pl.Series([7, 40], dtype=pl.UInt8), [1, 2]),
        (pl.Series(["7", "x", "-3"]), [1, -1, 0]),
        (
            pl.Series([7.0, 7.5, float("nan"), float("inf"), -3.0, 1e300, None]),
            [1, *[-1] * 3, 0, -1, -1],
        ),
        (pl.Series([None, None]), [-1, -1]),
        (pl.Series([], dtype=pl.Int64), []),
    ],
)
def test_items_of_any_type_find_their_row(asked: pl.Series, rows: list[int]) -> None:
    assert NUMBERS.rows(asked).tolist() == rows


@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        (pl.Series(["b", "a", "9", None, "c", ""]), [2, -1, 1, -1, -1, -1]),
        (pl.Series(["9", "b"], dtype=pl.Categorical), [1, 2]),
        (pl.Series([10, 9, 2**63], dtype=pl.UInt64), [0, 1, -1]),
    ],
)
def test_items_that_are_text_find_their_row(asked: pl.Series, rows: list[int]) -> None:
    assert TEXTS.rows(asked).tolist() == rows


def test_an_unknown_item_has_the_unknown_id_and_the_mean_number() -> None:
    rows = np.array([[2, UNKNOWN_ROW], [0, UNKNOWN_ROW]])
    columns = NUMBERS.columns(rows, ["kind", "size"])
    assert columns["kind"].tolist() == [[5, 1], [1, 1]]
    assert columns["size"].tolist() == [[2.0, 0.0], [0.5, 0.0]]
    assert {name: column.dtype.name for name, column in columns.items()} == {
        "kind": "int32",
        "size": "float32",
    }


def test_items_are_counted_each_alone_and_kinds_together_but_not_unknown_ones() -> None:
    rows = np.array([0, 1, 2, UNKNOWN_ROW])
    assert NUMBERS.counted("item")[rows].tolist() == [1, 2, 3, 0]
    assert NUMBERS.counted("kind")[rows].tolist() == [0, 5, 5, 0]
