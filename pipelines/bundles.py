"""From a trained model's folder to a bundle: graphs, encoders, catalogue, golden batch, gate."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from hashtab.features.dataset import Dataset
from hashtab.features.sources import ITEM, USER, sha256
from hashtab.features.storage import Array, write_text
from hashtab.models.ctr import ClickModel
from hashtab.pipelines.bundle_folders import bundle_at, digest_of, versions
from hashtab.pipelines.checkpoints import planes_digest
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.onnx_graphs import encoder_graph, scorer_graphs, write_graphs
from hashtab.pipelines.parity import Case, cases, check_parity, record_of
from hashtab.pipelines.saved_model import load_model
from hashtab.serving.bundle import Bundle
from hashtab.serving.golden import GoldenBatch
from hashtab.serving.manifest import (
    CATALOGUE,
    CLICKS,
    ENCODERS,
    FORMAT,
    GOLDEN,
    BundleManifest,
    Parity,
    TableShape,
)
from hashtab.serving.store.record import RECENT_LIMIT

_GOLDEN_CASES = 8
_GOLDEN_BEHAVIOURS = 1024
_MODEL_FILES = ("model.pt", "model.json")


def export_model(
    model_folder: Path, dataset: Dataset, target: Path, metrics: dict[str, dict[str, float]]
) -> BundleManifest:
    """Write the bundle of a trained model; nothing is left where the parity gate refuses it.

    Args:
        model_folder: with `model.pt` and `model.json`.
        dataset: that the model was trained on.
        target: folder of the bundle; the name of the run is that of its model.
        metrics: of the trained model, split -> metric -> value.

    Returns:
        The manifest; that of a bundle which is there already, if it holds the same model.

    Raises:
        SettingsError: if the data is not the model's, the model cannot be served, or the target
            holds something else.
        BundleError: if torch and onnxruntime disagree.
    """
    _check_data(model_folder, dataset)
    build = partial(_build, model_folder=model_folder, dataset=dataset, metrics=metrics)
    return bundle_at(target, BundleManifest, _model_digest(model_folder), build)


def _build(
    folder: Path, *, model_folder: Path, dataset: Dataset, metrics: dict[str, dict[str, float]]
) -> BundleManifest:
    model = load_model(model_folder)
    check_servable(model)
    _write_parts(folder, model, dataset)
    draft = _draft(folder, model, model_folder, dataset, metrics)
    bundle = Bundle(folder, draft)
    examples = cases(dataset, model)
    parity = check_parity(model, bundle, examples)
    golden_batch(bundle, examples).write(folder / GOLDEN)
    return replace(draft, parity=parity).write(folder)


def _check_data(model_folder: Path, dataset: Dataset) -> None:
    for name in _MODEL_FILES:
        if not (model_folder / name).is_file():
            raise SettingsError(
                f"{model_folder} holds no trained model ({name} is missing); name the folder of a "
                "finished run"
            )
    trained_on = json.loads((model_folder / "model.json").read_text())["data_digest"]
    if trained_on != dataset.manifest.digest:
        raise SettingsError(
            f"{model_folder} was trained on data of digest {trained_on[:12]}, but "
            f"{dataset.folder} has {dataset.manifest.digest[:12]}: give --data of that training"
        )


def _model_digest(model_folder: Path) -> str:
    return digest_of(model_folder / name for name in _MODEL_FILES)


def check_servable(model: ClickModel) -> None:
    """Refuse a model whose encoder reads more behaviours one by one than a record keeps.

    Raises:
        SettingsError: saying which setting would make it servable.
    """
    recent = model.encoder.recent
    if recent is None or recent > RECENT_LIMIT:
        raise SettingsError(
            f"encoder {model.settings.encoder!r} reads every behaviour of a history one by one, "
            f"which no record holds: train it with --model.history_limit of at most {RECENT_LIMIT}"
        )


def _write_parts(folder: Path, model: ClickModel, dataset: Dataset) -> None:
    graphs = scorer_graphs(model)
    if model.encoder.groups:
        graphs["encoder"] = encoder_graph(model)
    write_graphs(graphs, folder)
    tables = dataset.folder / "tables"
    shutil.copy(tables / CATALOGUE, folder / CATALOGUE)
    write_text(folder / ENCODERS, (tables / ENCODERS).read_text())


def _draft(
    folder: Path,
    model: ClickModel,
    model_folder: Path,
    dataset: Dataset,
    metrics: dict[str, dict[str, float]],
) -> BundleManifest:
    schema, encoder = dataset.manifest.schema, model.encoder
    features = dataset.manifest.features
    if not model.settings.counters:
        features = replace(features, counters=())
    items = {schema.item_name, *schema.item_categorical, *schema.item_numeric}
    draft = BundleManifest(
        format=FORMAT,
        kind=CLICKS,
        run=model_folder.resolve().parent.name,
        model_digest=_model_digest(model_folder),
        versions=versions(),
        encoder=model.settings.encoder,
        fingerprint="0" * 16,
        planes_digest=planes_digest(model),
        data_digest=dataset.manifest.digest,
        table=TableShape(
            groups=encoder.groups, buckets=encoder.buckets, size=model.settings.embedding_size
        ),
        recent=encoder.recent or 0,
        history_limit=encoder.last,
        counts_behaviours=encoder.needs_count,
        features=features,
        text_users=_is_text(dataset, "users", USER),
        text_items=_is_text(dataset, "catalogue", ITEM),
        item=schema.item_name,
        items=tuple(f.name for f in features.candidate if f.name in items),
        time_features=schema.context.time,
        parity=Parity(requests=0, scores=0, largest_difference=0.0, codes=0),
        metrics=metrics,
        files={},
    )
    return replace(draft, fingerprint=fingerprint(folder, model, draft))


def _is_text(dataset: Dataset, table: str, column: str) -> bool:
    return pl.read_ipc_schema(dataset.folder / "tables" / f"{table}.arrow")[column] == pl.String


def fingerprint(folder: Path, model: ClickModel, draft: BundleManifest) -> str:
    """Return 16 hex digits of all that decides what a user's record holds.

    These are the embeddings and planes that make the table, the shape of the record, and the ids of
    items and features. Models that differ in their head alone share their tables. What an encoder
    learns beside its table counts as well, so that no encoder has to tell the two apart.

    Args:
        folder: with catalogue and encoders.
        model: whose records are meant.
        draft: the manifest, all but its fingerprint.
    """
    digest = hashlib.sha256()
    parts = {"objects": model.objects, "encoder": model.encoder} if draft.table.groups else {}
    for part, module in parts.items():
        for name, value in module.state_dict().items():
            digest.update(f"{part}.{name}".encode() + value.cpu().numpy().tobytes())
    features = asdict(draft.features)
    record = features["behaviour"], features["counters"]
    shape = [asdict(draft.table), draft.recent, draft.history_limit, *record]
    ids = [sha256(folder / name) for name in (CATALOGUE, ENCODERS)]
    digest.update(json.dumps([shape, ids]).encode())
    return digest.hexdigest()[:16]


def golden_batch(bundle: Bundle, examples: list[Case]) -> GoldenBatch:
    """Return inputs and answers: the first cases as one batch to score, the longest to encode."""
    scored = examples[:_GOLDEN_CASES]
    records = [record_of(bundle, case.behaviours) for case in scored]
    inputs = bundle.scorer_inputs(records, [case.candidates for case in scored])
    if not bundle.layout.groups:
        none = np.empty(0, np.int32)
        return GoldenBatch(
            scorer_inputs=inputs,
            scores=bundle.run_scorer(inputs),
            encoder_inputs={},
            increments=none,
            codes=none,
        )
    longest = max(examples, key=lambda case: case.length).behaviours
    latest = {name: column[-_GOLDEN_BEHAVIOURS:] for name, column in longest.items()}
    behaviours: dict[str, Array] = bundle.encoder_inputs(latest)
    increments, codes, _ = bundle.run_encoder(behaviours)
    return GoldenBatch(
        scorer_inputs=inputs,
        scores=bundle.run_scorer(inputs),
        encoder_inputs=behaviours,
        increments=increments,
        codes=codes,
    )
