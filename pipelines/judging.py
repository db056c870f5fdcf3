"""Champion and challenger on the same labelled data, be they models of clicks or of tables."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.comparison import Comparison, compare, compare_losses
from hashtab.pipelines.report import metrics_table, number, table
from hashtab.pipelines.split_scores import score_split
from hashtab.pipelines.table_data import LabelledTable, labelled
from hashtab.pipelines.table_files import find_files, hashes
from hashtab.pipelines.table_metrics import losses, metrics
from hashtab.serving.bundle import Bundle
from hashtab.serving.table_bundle import TableBundle
from hashtab.serving.table_manifest import TableManifest

SPLIT = "validation"

Folders = Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a comparison of champion and challenger came to.

    Args:
        comparison: of the two.
        table: of their metrics, as text.
        split: of the data that they were compared on.
        data_digest: of that data.
        tag: of a registered version, that keeps the difference.
    """

    comparison: Comparison
    table: str
    split: str
    data_digest: str
    tag: str


def judge_clicks(folders: Folders, data: str, resamples: int, confidence: float) -> Verdict:
    """Compare gAUC on the validation split of a prepared data set, user by user.

    Args:
        folders: of the bundles by what they are called, the champion first.
        data: folder of the data set.
        resamples: of the bootstrap.
        confidence: that the difference must be above 0 with.

    Raises:
        DataError: if the data lacks what a model reads.
        BundleError: if a bundle cannot be used.
    """
    dataset = Dataset.open(data)
    before, after = (
        score_split(Bundle.open(folder), dataset, SPLIT, name) for name, folder in folders.items()
    )
    names = {"gauc": "gAUC", "auc": "AUC", "log_loss": "log loss"}
    rows = []
    for name, predictions in zip(folders, (before, after), strict=True):
        found = predictions.metrics()
        rows.append([name, *(number(found, metric) for metric in names)])
    return Verdict(
        comparison=compare(before, after, resamples, confidence),
        table=table([f"{SPLIT} of {data}", *names.values()], rows),
        split=SPLIT,
        data_digest=dataset.manifest.digest,
        tag="gauc_difference",
    )


def judge_tables(folders: Folders, data: str, resamples: int, confidence: float) -> Verdict:
    """Compare the mean loss on a labelled table, row by row; arguments as of `judge_clicks`.

    Raises:
        SettingsError: if the models predict different things.
        DataError: if the table cannot be used, or has classes that a model does not know.
        BundleError: if a bundle cannot be used.
    """
    bundles = {name: TableBundle.open(folder) for name, folder in folders.items()}
    manifests = [bundle.manifest for bundle in bundles.values()]
    asked = [(m.task, m.target, m.classes or m.quantiles) for m in manifests]
    if asked[0] != asked[1]:
        raise SettingsError(
            f"the champion predicts {asked[0]}, the challenger {asked[1]}: they cannot be "
            "compared; --force promotes all the same"
        )
    found: dict[str, dict[str, float]] = {}
    each: list[NDArray[np.float64]] = []
    for name, bundle in bundles.items():
        manifest = bundle.manifest
        rows, _ = labelled(data, manifest.columns, manifest.target, manifest.task)
        classes = bundle.labels if manifest.classes else None
        _check_target(rows, classes, data)
        predicted = bundle.raw(rows.frame)
        found[name] = metrics(rows.target, predicted, classes, manifest.quantiles)
        each.append(losses(rows.target, predicted, classes, manifest.quantiles))
    files = hashes(find_files(data, "table"))
    return Verdict(
        comparison=compare_losses(each[0], each[1], _loss(manifests[0]), resamples, confidence),
        table=metrics_table(found, data),
        split="all",
        data_digest=hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest(),
        tag="loss_difference",
    )


def _loss(manifest: TableManifest) -> str:
    if manifest.classes:
        return "log loss"
    return "pinball loss" if manifest.quantiles else "squared error"


def _check_target(rows: LabelledTable, classes: NDArray[Any] | None, data: str) -> None:
    if not len(rows):
        raise DataError(f"{data} holds no row with a target: there is nothing to compare")
    unknown = set() if classes is None else set(rows.target.tolist()) - set(classes.tolist())
    if unknown:
        raise DataError(
            f"{data} has classes {sorted(unknown)[:5]} that the models do not know: leave these "
            "rows out"
        )
