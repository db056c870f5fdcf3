"""Frames of any library as numbers and categories."""

import datetime
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy.sparse import csr_matrix

from hashtab.models.tabular.table import Frame, Table
from tests.models.tabular.tables import Array

ROWS = 6
DAY = datetime.date(2024, 5, 1)


def read(x: Any, declared: list[Any] | None = None) -> tuple[Table, Array, Array]:
    frame = Frame(x, "an estimator")
    table = Table.of(frame, declared)
    values, categories = table.values(frame)
    return table, values, table.codes(categories)


def again(table: Table, x: Any) -> tuple[Array, Array]:
    values, categories = table.values(table.frame(x, "an estimator"))
    return values, table.codes(categories)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pd.Series([1, 2, 3, 4, 5, 6]), "number"),
        (pd.Series([1, 2, None, 4, 5, 6], dtype="Int64"), "number"),
        (pd.Series([1, 2, None, 4, 5, 6], dtype="Float32"), "number"),
        (pd.Series([1, 2.5, None, 4, 5, 6], dtype=object), "number"),
        (pd.Series([1, 2, 3, 4, 5, 6], dtype="uint8"), "number"),
        (pd.Series(["a", "b", None, "a", "", "b"], dtype=object), "category"),
        (pd.Series(["a", "b", None, "a", "a", "b"], dtype="string"), "category"),
        (pd.Series(["a", "b", None, "a", "a", "b"], dtype="category"), "category"),
        (pd.Series([True, False] * 3), "category"),
        (pd.Series([True, None] * 3, dtype="boolean"), "category"),
        (pd.Series([True, None] * 3, dtype=object), "category"),
        (pd.Series([None] * ROWS, dtype=object), "category"),
        (pl.Series([1, 2, None, 4, 5, 6]), "number"),
        (pl.Series([1.0, 2, None, 4, 5, 6], dtype=pl.Float32), "number"),
        (pl.Series(["1.5"] * ROWS).cast(pl.Decimal(10, 2)), "number"),
        (pl.Series(["a", "b", None, "a", "a", "b"]), "category"),
        (pl.Series(["a", "b", None, "a", "a", "b"], dtype=pl.Categorical), "category"),
        (pl.Series(["a", "b", None, "a", "a", "b"], dtype=pl.Enum(["b", "a"])), "category"),
        (pl.Series(["a", "b"] * 3, dtype=pl.Object), "category"),
        (pl.Series([True, None] * 3), "category"),
        (pl.Series([None] * ROWS), "category"),
    ],
)
def test_a_column_is_numbers_or_categories_by_its_type(column: Any, kind: str) -> None:
    frame = pd.DataFrame({"c": column}) if isinstance(column, pd.Series) else pl.DataFrame([column])
    table, values, codes = read(frame)
    assert (len(table.numeric), len(table.categorical)) == ((1, 0) if kind == "number" else (0, 1))
    absent = [v is None or v is pd.NA or v != v or v == "" for v in column.to_list()]
    if kind == "number":
        assert np.isnan(values[:, 0]).tolist() == absent
        assert values[0, 0] == float(column.to_list()[0])
    else:
        assert (codes[:, 0] == 1).tolist() == absent
        assert "" not in table.categories[0]


def test_pandas_and_polars_give_one_table() -> None:
    columns: dict[str, list[Any]] = {
        "n": [1, 2, None, 4, 5, 6],
        "f": [0.5, float("inf"), None, -float("inf"), 1, 2],
        "s": ["a", None, "b", "a", "ü", ""],
        "b": [True, False, None, True, True, False],
    }
    from_pandas = read(pd.DataFrame(columns))
    from_polars = read(pl.DataFrame(columns, strict=False))
    from_nullable = read(pd.DataFrame(columns).convert_dtypes())
    for other in (from_polars, from_nullable):
        assert other[0] == from_pandas[0]
        np.testing.assert_array_equal(other[1], from_pandas[1])
        np.testing.assert_array_equal(other[2], from_pandas[2])


@pytest.mark.parametrize("declared", [["code"], [1]])
def test_integer_codes_are_categories_when_declared(declared: list[Any]) -> None:
    frame = pd.DataFrame({"n": [0.5, 1, 2], "code": [7, 3, 7]})
    table, _, codes = read(frame, declared)
    assert table.categories == (("3", "7"),)
    assert codes[:, 0].tolist() == [3, 2, 3]
    # A gap turns integers into floats; they are the same codes.
    later = pd.DataFrame({"n": [0, 0, 0], "code": [3, np.nan, 99]})
    assert again(table, later)[1][:, 0].tolist() == [2, 1, 0]


def test_declared_columns_of_an_array_are_categories() -> None:
    table, values, codes = read(np.array([[0.5, 3], [1, np.nan], [2, 4]]), [1])
    assert table.numeric == (0,)
    assert values[:, 0].tolist() == [0.5, 1, 2]
    assert codes[:, 0].tolist() == [2, 1, 3]


@pytest.mark.parametrize("declared", [["absent"], [2], [-1], [1.5]])
def test_declared_columns_must_be_there(declared: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"categorical_features .* got .*columns are \['a', 'b'\]"):
        read(pd.DataFrame({"a": [1], "b": [1]}), declared)


def test_categories_may_be_new_or_missing_later() -> None:
    table, _, codes = read(pd.DataFrame({"c": ["b", "a", "b"]}))
    assert codes[:, 0].tolist() == [3, 2, 3]
    later = pl.DataFrame({"c": ["a", None, "new", "", "b"]})
    assert again(table, later)[1][:, 0].tolist() == [2, 1, 0, 1, 3]


@pytest.mark.parametrize("true", [True, np.True_], ids=["bool", "numpy"])
def test_true_is_not_one(true: Any) -> None:
    column = pd.Series([true, 1, 1.0, None, 0, not true], dtype=object)
    table, _, codes = read(pd.DataFrame({"c": column}))
    assert table.categories == (("0", "1", "false", "true"),)
    assert codes[:, 0].tolist() == [5, 3, 3, 1, 2, 4]
    saved = Table.from_plain(json.loads(json.dumps(asdict(table))))
    assert again(saved, pd.DataFrame({"c": column[::-1]}))[1][:, 0].tolist() == [4, 2, 1, 3, 3, 5]
    assert again(saved, pl.DataFrame({"c": ["true", "1"]}))[1][:, 0].tolist() == [5, 3]


NUMBERS = [str(i % 30) for i in range(150)]
NAMES = [f"c{i}" for i in range(150)]
FEW = [f"c{i % 30}" for i in range(150)]


@pytest.mark.parametrize("kind", [pd.DataFrame, pl.DataFrame])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["N/A", *NUMBERS[1:]], "'c' holds text though 149 of 150 values are numbers.*'N/A' into"),
        (["-", "?", "?", *NUMBERS[3:]], r"147 of 150 values are numbers.*'\?' and the like into"),
        (NUMBERS, "150 of 150 values are numbers: made categories; turn it into numbers, or decl"),
        ([None] * 40 + [f"{i}.5" for i in range(110)], "110 of 110 values are numbers"),
        (NAMES, "'c' holds 150 different categories in 150 rows: .* drop it if it only names rows"),
        (FEW[:70] + NAMES[70:], "'c' holds 110 different categories in 150 rows"),
    ],
    ids=["one", "some", "all", "gaps", "names", "most"],
)
def test_odd_columns_of_text_are_warned_of(kind: Any, column: list[str], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        table, _, codes = read(kind({"c": column}))
    assert table.categorical == (0,)
    assert (codes[:, 0] > 0).all()


@pytest.mark.parametrize(
    ("table", "declared"),
    [
        (pd.DataFrame({"c": FEW}), None),
        (pd.DataFrame({"c": NUMBERS[:70] + FEW[70:]}), None),
        (pd.DataFrame({"c": NUMBERS}), ["c"]),
        (pd.DataFrame({"c": NUMBERS}, dtype="category"), None),
        (pl.DataFrame({"c": NUMBERS}, schema={"c": pl.Categorical}), None),
        (pd.DataFrame({"c": NUMBERS[:99], "d": NAMES[:99]}), None),
        (pd.DataFrame({"c": [None] * 60 + NAMES[60:]}), None),
        (pd.DataFrame({"c": [True, False] * 75}), None),
        (pd.DataFrame({"c": list(range(150))}), None),
        (np.array([NUMBERS, NAMES], dtype=object).T, None),
    ],
    ids=lambda value: None if value is None else type(value).__module__.partition(".")[0],
)
def test_ordinary_columns_are_not_warned_of(table: Any, declared: list[str] | None) -> None:
    read(table, declared)  # warnings are errors here


def test_columns_are_matched_by_name() -> None:
    frame = pd.DataFrame({"n": [1.0, 2], "c": ["x", "y"], "m": [3.0, 4]})
    table, values, codes = read(frame)
    moved = pl.DataFrame({"m": [3.0, 4], "extra": [0, 0], "c": ["x", "y"], "n": [1.0, 2]})
    later = again(table, moved)
    np.testing.assert_array_equal(later[0], values)
    np.testing.assert_array_equal(later[1], codes)
    with pytest.raises(ValueError, match=r"missing now: \['n', 'm'\]"):
        again(table, frame[["c"]])


def test_an_array_is_read_by_position() -> None:
    table, values, _ = read(pd.DataFrame({"n": [1.0, 2], "m": [3.0, 4]}))
    with pytest.warns(UserWarning, match="no column names"):
        later = again(table, np.array([[1.0, 3], [2, 4]]))
    np.testing.assert_array_equal(later[0], values)
    with pytest.raises(ValueError, match="X has 1 features, but str is expecting 2"):
        again(table, np.ones((2, 1)))


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"when": pd.to_datetime([DAY] * 2)}),
        pd.DataFrame({"when": pd.to_timedelta([1, 2], unit="D")}),
        pd.DataFrame({"when": pd.period_range("2024", periods=2)}),
        pd.DataFrame({"when": [None, DAY]}, dtype=object),
        pl.DataFrame({"when": [DAY, None]}),
        pl.DataFrame({"when": [datetime.datetime(2024, 5, 1)] * 2}),
        pl.DataFrame({"when": [datetime.timedelta(1)] * 2}),
        pl.DataFrame({"when": [datetime.time(1)] * 2}),
    ],
    ids=lambda frame: f"{type(frame).__module__.partition('.')[0]}-{frame['when'].dtype}",
)
def test_dates_are_refused_with_advice(frame: Any) -> None:
    with pytest.raises(TypeError, match=r"'when' holds dates or times .* days since an event"):
        read(frame)


@pytest.mark.parametrize(
    "later",
    [
        pd.DataFrame({"n": pd.to_datetime([DAY])}),
        pl.DataFrame({"n": [DAY]}),
        pl.DataFrame({"n": [datetime.timedelta(1)]}),
    ],
)
def test_dates_among_later_numbers_are_refused(later: Any) -> None:
    table, _, _ = read(pd.DataFrame({"n": [1.0]}))
    with pytest.raises(TypeError, match="'n' holds dates or times"):
        again(table, later)


@pytest.mark.parametrize(
    "later", [pd.DataFrame({"n": [1.0], "m": ["x"]}), pl.DataFrame({"n": [1.0], "m": ["x"]})]
)
def test_text_among_later_numbers_is_refused(later: Any) -> None:
    table, _, _ = read(pd.DataFrame({"n": [1.0], "m": [1.0]}))
    with pytest.raises(ValueError, match="column 'm' held numbers in fit"):
        again(table, later)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: csr_matrix(np.eye(2)), TypeError, "Sparse data"),
        (lambda: pd.DataFrame([[1, 2]], columns=["a", "a"]), ValueError, r"more than one of \['a'"),
        (lambda: pd.DataFrame({"a": []}), ValueError, "0 sample"),
        (lambda: pl.DataFrame(), ValueError, "0 feature"),
        (lambda: np.ones(3), ValueError, "2D array"),
        (lambda: pd.DataFrame({"a": [[1], [2]]}), ValueError, "'a'"),
        (lambda: pl.DataFrame({"a": [[1], [2]]}), TypeError, "'a' must hold numbers or categories"),
        (lambda: pl.DataFrame({"a": [{"b": 1}]}), TypeError, "'a' is no category"),
    ],
)
def test_what_is_no_table_is_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(make())


@pytest.mark.parametrize("kind", [pd.DataFrame, pl.DataFrame])
def test_rows_are_left_out_of_any_frame(kind: Any) -> None:
    kept = np.array([True, False, True])
    part = Frame(kind({"a": [1.0, 2, 3]}), "e").rows_where(kept)
    assert part.rows == 2
    assert list(part.column("a")) == [1, 3]
