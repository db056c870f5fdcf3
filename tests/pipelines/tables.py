"""A labelled table with every kind of column, and bundles of small models of it.

A fixture is the folder of a bundle; the model that it was exported from lies beside it, in `model`.
"""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hashtab.models.tabular.settings import NetworkSettings, TrainingSettings
from hashtab.pipelines.table_bundles import export_table, save_estimator
from hashtab.pipelines.table_data import TableSettings, load
from hashtab.pipelines.table_runs import TableTrainSettings
from hashtab.pipelines.table_training import fit

ROWS = 120
SMALL_NETWORK = NetworkSettings(width=8, mixer_width=8, bins=4, readout_width=16, dropout=0.0)
SMALL_TRAINING = TrainingSettings(folds=2, max_epochs=4)


def customers(rows: int = ROWS, seed: int = 0) -> pl.DataFrame:
    """Return customers, some values missing, with who left (`churned`) and how much they spent."""
    random = np.random.default_rng(seed)
    age, city = random.normal(40, 10, rows), random.choice(["Łódź", "Bonn", "007"], rows)
    member, plan = random.random(rows) < 0.5, random.integers(1, 13, rows)
    risk = (age < 40).astype(float) + (city == "Bonn") + member
    frame = pl.DataFrame(
        {
            "id": np.arange(rows) + 1000,
            "age": age.round(2),
            "city": city,
            "member": member,
            "plan": plan,
            "visits": random.poisson(3, rows),
            "churned": np.where(risk + random.normal(0, 0.5, rows) > 1.5, "yes", "no"),
            "spent": (100 * risk + age + random.normal(0, 5, rows)).round(2),
        }
    )
    holes = {name: random.random(rows) < 0.1 for name in ("age", "city", "member", "plan")}
    return frame.with_columns(
        pl.when(pl.Series(hole)).then(None).otherwise(pl.col(name)).alias(name)
        for name, hole in holes.items()
    )


def settings_of(file: Path, target: str = "churned") -> TableTrainSettings:
    """Return the settings of a training of about a second."""
    other = "spent" if target == "churned" else "churned"
    data = TableSettings(file=str(file), target=target, drop=("id", other), categorical=("plan",))
    return TableTrainSettings(data=data, network=SMALL_NETWORK, training=SMALL_TRAINING)


def export_small(folder: Path, settings: TableTrainSettings) -> Path:
    """Train, save in `folder / "model"`, and return the folder of the bundle."""
    data = load(settings.data, settings.seed)
    (folder / "model").mkdir(parents=True)
    save_estimator(folder / "model", fit(settings, data), data, str(settings.data.target))
    export_table(folder / "model", folder / "bundle", {"test": {"auc": 0.5}})
    return folder / "bundle"


@pytest.fixture(scope="session")
def customers_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table as CSV."""
    path = tmp_path_factory.mktemp("customers") / "customers.csv"
    customers().write_csv(path)
    return path


@pytest.fixture(scope="session")
def churn_bundle(customers_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Who leaves: two classes, text."""
    folder = tmp_path_factory.mktemp("churn") / "churn-run"
    return export_small(folder, settings_of(customers_file))


@pytest.fixture(scope="session")
def spent_bundle(customers_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """How much they spend: a number."""
    folder = tmp_path_factory.mktemp("spent") / "spent-run"
    return export_small(folder, settings_of(customers_file, "spent"))
