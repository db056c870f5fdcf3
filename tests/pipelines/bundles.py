"""Exported bundles of small models, one an encoder, each made once for all tests that ask for it.

A fixture is the folder of a bundle; the model that it was exported from lies beside it, in `model`.
"""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from hashtab.features.dataset import Dataset
from hashtab.features.prepare import prepare
from hashtab.models.ctr import ClickModel, ClickModelSettings, FeatureSpec, TensorBatch
from hashtab.pipelines.bundles import export_model
from hashtab.pipelines.saved_model import save_model
from tests.features import logs

HISTORY_LIMIT, WINDOW = 12, 6  # shorter than most histories, so that behaviours expire


def small_model(
    dataset: Dataset, encoder: str, *, counters: bool = False, seed: int = 0
) -> ClickModel:
    """Return an untrained model; its history limit holds for every encoder."""
    settings = ClickModelSettings(
        encoder=encoder,
        embedding_size=8,
        planes=12,
        tau=3,
        history_limit=HISTORY_LIMIT,
        window=WINDOW,
        hidden=(16,),
        dropout=0.0,
        counters=counters,
    )
    torch.manual_seed(seed)
    features = FeatureSpec.from_dict(asdict(dataset.manifest.features))
    return ClickModel(features, settings).eval()


def fit(model: ClickModel, dataset: Dataset, epochs: int = 4) -> ClickModel:
    """Train a model on the training split, in place."""
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-2)
    for epoch in range(epochs):
        for batch in dataset.batches("train", 64, HISTORY_LIMIT, shuffle_seed=epoch):
            tensors = TensorBatch.from_numpy(batch)
            optimiser.zero_grad()
            binary_cross_entropy_with_logits(model(tensors), tensors.labels).backward()
            optimiser.step()
    return model.eval()


def export_bundle(folder: Path, model: ClickModel, dataset: Dataset) -> Path:
    """Save a model in `folder / "model"` and return the folder of its bundle, `folder / "bundle"`.

    The name of the run is that of `folder`.
    """
    save_model(folder / "model", model, dataset.manifest)
    metrics = {split: {"gauc": 0.5} for split in ("validation", "test")}
    export_model(folder / "model", dataset, folder / "bundle", metrics)
    return folder / "bundle"


def _bundle(
    data: Path, factory: pytest.TempPathFactory, encoder: str, *, counters: bool = False
) -> Path:
    dataset = Dataset.open(data)
    model = small_model(dataset, encoder, counters=counters)
    return export_bundle(factory.mktemp(encoder) / f"{encoder}-run", model, dataset)


@pytest.fixture(scope="session")
def sdim_bundle(likes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDIM with counters on `likes`; its table holds the latest 12 behaviours."""
    return _bundle(likes, tmp_path_factory, "sdim", counters=True)


@pytest.fixture(scope="session")
def fitted_bundle(likes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `sdim_bundle`, but trained."""
    dataset = Dataset.open(likes)
    model = fit(small_model(dataset, "sdim", counters=True), dataset)
    return export_bundle(tmp_path_factory.mktemp("fitted") / "fitted-run", model, dataset)


@pytest.fixture(scope="session")
def long_short_bundle(likes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table, and the latest 6 behaviours one by one; on `likes`."""
    return _bundle(likes, tmp_path_factory, "sdim_long_short")


@pytest.fixture(scope="session")
def mean_bundle(likes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of one bucket, and how many behaviours it holds; on `likes`."""
    return _bundle(likes, tmp_path_factory, "mean")


@pytest.fixture(scope="session")
def none_bundle(likes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but counters of a user's past; on `likes`."""
    return _bundle(likes, tmp_path_factory, "none", counters=True)


@pytest.fixture(scope="session")
def din_bundle(likes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latest 6 behaviours one by one and no table; on `likes`."""
    return _bundle(likes, tmp_path_factory, "din")


@pytest.fixture(scope="session")
def shop_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set with side features of behaviours, context of every kind and numbers."""
    folder = tmp_path_factory.mktemp("shop")
    prepare(logs.shop(folder / "raw"), folder / "shop", shards=3)
    return folder / "shop"


@pytest.fixture(scope="session")
def shop_bundle(shop_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table, recent behaviours and counters on `shop_data`."""
    return _bundle(shop_data, tmp_path_factory, "sdim_long_short", counters=True)
