"""The README's own examples, run as they stand."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hashtab.features.dataset import Dataset
from hashtab.features.prepare import prepare
from hashtab.features.schema import Schema
from hashtab.models.tabular import TabNSAClassifier
from hashtab.pipelines.encode_users import EncodeSettings, encode
from tests.pipelines.bundles import export_bundle, small_model

README = Path(__file__).resolve().parent.parent / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.M | re.S)


def test_the_operators_run_as_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {}
    _, operators, _ = _blocks("python")
    exec(operators, names)
    assert tuple(names["table"].shape) == (2, 16, 8, 32)  # type: ignore[attr-defined]
    assert tuple(names["interest"].shape) == (2, 5, 32)  # type: ignore[attr-defined]


def test_a_table_is_learnt_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    table, _, _ = _blocks("python")
    exec(table, names)
    assert names["probabilities"].shape == (3, 2)
    assert names["drivers"].columns == ["age", "plan"]
    assert TabNSAClassifier.load("churn").predict(names["table"]).mean() > 0.05


@pytest.fixture
def my_shop(tmp_path: Path) -> Dataset:
    """One's own log, prepared from the schema shown."""
    rng = np.random.default_rng(0)
    n, items = 3000, 40
    first = datetime(2024, 1, 1, tzinfo=UTC).timestamp()
    (tmp_path / "purchases").mkdir()
    pl.DataFrame(
        {
            "user_id": rng.integers(0, 50, n),
            "item_id": rng.integers(0, items, n),
            "bought_at": (first + rng.integers(0, 90 * 86_400, n)).astype(np.int64),
        }
    ).write_parquet(tmp_path / "purchases" / "all.parquet")
    pl.DataFrame(
        {"item_id": np.arange(items), "category": ["a", "b"] * 20, "brand": ["x", "y"] * 20}
    ).write_csv(tmp_path / "items.csv")
    (schema_shown,) = _blocks("yaml")
    (tmp_path / "my_shop.yaml").write_text(schema_shown)

    schema = Schema.from_yaml(tmp_path / "my_shop.yaml")
    prepare(schema, tmp_path / "data", shards=2)
    return Dataset.open(tmp_path / "data")


def test_ones_own_log_prepares_from_the_schema_shown(my_shop: Dataset) -> None:
    batch = next(my_shop.batches("train"))
    assert set(batch.behaviours) == {"item_id", "category", "brand"}
    assert batch.counters.shape == (len(batch.labels), 2)


def test_scores_come_in_python_as_shown(
    my_shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(my_shop, "sdim", counters=True)
    bundle = export_bundle(tmp_path / "runs" / "sdim-1a2b3c4d", model, my_shop)
    monkeypatch.chdir(tmp_path)
    encode(EncodeSettings(bundle=str(bundle), data=str(my_shop.folder), workers=0))
    names: dict[str, Any] = {}
    _, _, scoring = _blocks("python")
    exec(scoring, names)
    assert names["scores"].shape == (3,)
    assert names["record"].behaviours > 0


@pytest.mark.parametrize("path", re.findall(r"\]\(([a-z][^):#]*)\)", README.read_text()))
def test_links_lead_somewhere(path: str) -> None:
    assert (README.parent / path).exists()
