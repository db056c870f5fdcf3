"""Words on columns of text that are probably no categories."""

import math
from collections import Counter

_ROWS = 100  # in fewer nothing is odd


def of_categories(name: str, counts: Counter[str], may_be_numbers: bool) -> str | None:
    """Say what is odd about a column of categories, and what to do; None if nothing is.

    Args:
        name: of the column.
        counts: of each category, in how many rows it is.
        may_be_numbers: whether nobody said that it holds categories.
    """
    rows = counts.total()
    if rows < _ROWS:
        return None
    if may_be_numbers:
        others = Counter({text: count for text, count in counts.items() if not _is_number(text)})
        numbers = rows - others.total()
        if 2 * numbers > rows:
            return (
                f"column {name!r} holds text though {numbers:,} of {rows:,} values are numbers: "
                f"made categories; {_to_numbers(others)}, or declare it in categorical_features"
            )
    if 2 * len(counts) > rows:
        return (
            f"column {name!r} holds {len(counts):,} different categories in {rows:,} rows: too few "
            "rows of each to learn from, and new ones later; drop it if it only names rows, or "
            "make categories of it that repeat"
        )
    return None


def _to_numbers(others: Counter[str]) -> str:
    if not others:
        return "turn it into numbers"
    ((example, _),) = others.most_common(1)
    alike = " and the like" if len(others) > 1 else ""
    return f"turn {example!r}{alike} into missing values for numbers"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
