"""What tests of the scorer share: a store of tables, and bundles that differ."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hashtab.features.dataset import Dataset
from hashtab.pipelines.encode_users import EncodeSettings, encode
from hashtab.serving.manifest import BundleManifest
from tests.pipelines.bundles import export_bundle, mean_bundle, small_model
from tests.pipelines.conftest import likes
from tests.serving.scorer.kept import kept, shop
from tests.serving.scorer.servers import Server, scorer

# Fixtures that live in a file of their own; pytest finds them by these names.
__all__ = ["kept", "likes", "mean_bundle", "shop"]


@pytest.fixture(scope="session")
def shop_store(
    shop_bundle: Path, shop_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Tables of all users of the shop, as of the test split."""
    return encoded(shop_bundle, shop_data, tmp_path_factory.mktemp("tables") / "store")


def encoded(bundle: Path, data: Path, store: Path) -> Path:
    """Encode all users of a data set into a store."""
    encode(
        EncodeSettings(
            bundle=str(bundle), data=str(data), store=str(store), as_of="test", workers=0
        )
    )
    return store


@pytest.fixture(scope="session")
def other_bundle(shop_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the shop with other planes and embeddings, and so another fingerprint."""
    dataset = Dataset.open(shop_data)
    model = small_model(dataset, "sdim_long_short", counters=True, seed=1)
    return export_bundle(tmp_path_factory.mktemp("other") / "other-run", model, dataset)


@pytest.fixture
def again(shop_bundle: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a bundle of another digest that scores the same."""

    def make(name: str) -> Path:
        folder = shutil.copytree(shop_bundle, tmp_path / name)
        replace(BundleManifest.read(folder), run=name).write(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def server(
    shop_bundle: Path, shop_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A scorer of the shop that no test changes."""
    folder = tmp_path_factory.mktemp("server")
    with scorer(folder, "--bundle", shop_bundle, "--store", shop_store) as running:
        yield running
