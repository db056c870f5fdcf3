"""A bundle's index, small and exact, and one of many made-up items, in cells."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hashtab.features.dataset import Dataset
from hashtab.pipelines.build_index import read
from hashtab.pipelines.encoding import moment
from hashtab.serving.bundle import Bundle
from hashtab.serving.retrieval import RetrievalIndex, Sample, build_index, building

ITEMS, TASTES, SIZE = 20_000, 40, 8


@dataclass(frozen=True, kw_only=True)
class Many:
    """An index of items around a few tastes, some of them far more popular than others.

    Args:
        folder: of the index.
        vectors: `[items, size]`.
        sample: of users who each like one taste.
    """

    folder: Path
    vectors: np.ndarray
    counts: np.ndarray
    sample: Sample


@pytest.fixture(scope="session")
def shop_index(
    shop_bundle: Path, shop_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("shop-index")
    bundle, dataset = Bundle.open(shop_bundle), Dataset.open(shop_data)
    build_index(bundle, folder, **read(bundle, dataset, moment(dataset, "test")).__dict__)
    return folder


def many_items(seed: int = 0) -> tuple[np.ndarray, np.ndarray, Sample]:
    random = np.random.default_rng(seed)
    tastes = 3 * random.standard_normal((TASTES, SIZE))
    taste = random.integers(TASTES, size=ITEMS)
    vectors = (tastes[taste] + random.standard_normal((ITEMS, SIZE))).astype(np.float32)
    counts = np.floor(random.pareto(1.0, ITEMS))
    of_taste = [np.flatnonzero(taste == i) for i in range(TASTES)]
    liked = [random.choice(of_taste[i], 50) for i in random.integers(TASTES, size=200)]
    means = np.stack([vectors[rows].mean(axis=0, dtype=np.float64) for rows in liked])
    sample = Sample(
        means=means, behaviours=np.full(200, 50.0), seen=liked, words="200 made-up users"
    )
    return vectors, counts, sample


def build_many(bundle: Bundle, folder: Path) -> Many:
    vectors, counts, sample = many_items()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "item_vectors", lambda _: vectors)
        build_index(bundle, folder, counts=counts, sample=sample, data_digest="0" * 64, as_of=0)
    return Many(folder=folder, vectors=vectors, counts=counts, sample=sample)


@pytest.fixture(scope="session")
def many(shop_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Many:
    return build_many(Bundle.open(shop_bundle), tmp_path_factory.mktemp("many"))


@pytest.fixture
def many_index(many: Many, shop_bundle: Path) -> RetrievalIndex:
    return RetrievalIndex.open(many.folder, Bundle.open(shop_bundle))
