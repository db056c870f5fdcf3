"""The demo of tables comes to its end, and a second time to the same one at once."""

from pathlib import Path

import pytest

from hashtab.models.tabular.settings import TrainingSettings
from hashtab.pipelines.demo_tabular import DemoTabularSettings, show
from tests.pipelines.tables import SMALL_NETWORK

# MLflow and what it imports deprecate each other's names, which is none of our doing.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint:UserWarning"
)


def test_the_demo_of_tables_shows_both_and_is_reused(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = DemoTabularSettings(
        data=str(tmp_path / "tables"),
        network=SMALL_NETWORK,
        training=TrainingSettings(folds=1, max_epochs=1),
        storage=str(tmp_path / "runs"),
        tracking_uri=database,
    )
    said = show(settings)
    for words in ("logistic regression", "ridge regression", "TabNSA", "113 rows scored from"):
        assert words in said
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.onnx")}
    assert len(begun) == 2
    show(settings)
    assert {path: path.stat().st_mtime_ns for path in begun} == begun
