"""Small tables and quick settings that tests of TabNSA share."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hashtab.models.tabular import TabNSAClassifier, TabNSARegressor

Array = npt.NDArray[Any]

QUICK: dict[str, Any] = {
    "folds": 2,
    "max_epochs": 4,
    "width": 8,
    "mixer_width": 8,
    "readout_width": 16,
    "averaging": 0.0,
    "n_jobs": 1,
    "random_state": 0,
}


def classifier(**changed: Any) -> TabNSAClassifier:
    return TabNSAClassifier(**(QUICK | changed))


def regressor(**changed: Any) -> TabNSARegressor:
    return TabNSARegressor(**(QUICK | changed))


def mixed(rows: int = 120, seed: int = 0) -> tuple[pd.DataFrame, Array]:
    """Numbers with gaps, text with gaps, codes and bools; labels follow the numbers."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": draw.normal(40, 10, rows),
            "city": pd.Series(draw.choice(["Bonn", "Lima", "Oslo"], rows), dtype=object),
            "income": draw.exponential(1000, rows),
            "code": draw.integers(0, 4, rows),
            "member": draw.random(rows) < 0.5,
        }
    )
    labels = np.where(frame["age"] + 5 * frame["member"] > 42, "yes", "no")
    frame.loc[draw.random(rows) < 0.1, "income"] = np.nan
    frame.loc[draw.random(rows) < 0.1, "city"] = None
    return frame, labels


def numbers(rows: int = 200, columns: int = 4, seed: int = 0) -> tuple[Array, Array]:
    """Normal numbers, and a target that is 3 times the first of them, with some noise."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, columns))
    return x, 3 * x[:, 0] + 0.1 * draw.normal(size=rows)
