"""The README's own examples, run as they stand."""

import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hashtab.features.dataset import Dataset
from hashtab.features.prepare import prepare
from hashtab.features.schema import Schema

README = Path(__file__).resolve().parent.parent / "README.md"


def _block(language: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.M | re.S)
    assert len(blocks) == 1
    block: str = blocks[0]
    return block


def test_the_operators_run_as_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {}
    exec(_block("python"), names)
    assert tuple(names["table"].shape) == (2, 16, 8, 32)  # type: ignore[attr-defined]
    assert tuple(names["interest"].shape) == (2, 5, 32)  # type: ignore[attr-defined]


def test_ones_own_log_prepares_from_the_schema_shown(tmp_path: Path) -> None:
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
    (tmp_path / "my_shop.yaml").write_text(_block("yaml"))

    schema = Schema.from_yaml(tmp_path / "my_shop.yaml")
    prepare(schema, tmp_path / "data", shards=2)
    batch = next(Dataset.open(tmp_path / "data").batches("train"))
    assert set(batch.behaviours) == {"item_id", "category", "brand"}
    assert batch.counters.shape == (len(batch.labels), 2)


@pytest.mark.parametrize("path", re.findall(r"\]\(([a-z][^):#]*)\)", README.read_text()))
def test_links_lead_somewhere(path: str) -> None:
    assert (README.parent / path).exists()
