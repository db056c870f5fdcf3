"""A trained model as files: weights that load without running code, and what they mean."""

import json
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError

import torch

from hashtab.features.manifest import Manifest
from hashtab.features.storage import write_text
from hashtab.models.ctr import ClickModel, ClickModelSettings, FeatureSpec
from hashtab.pipelines.checkpoints import CheckpointError, planes_digest, write_atomically
from hashtab.pipelines.command_line import from_plain

FORMAT = 1


def save_model(folder: Path, model: ClickModel, manifest: Manifest) -> None:
    """Write `model.pt` (the state dict) and `model.json` (settings, features, digests)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    write_atomically(folder / "model.pt", state)
    meaning = {
        "format": FORMAT,
        "settings": asdict(model.settings),
        "features": asdict(manifest.features),
        "data_digest": manifest.digest,
        "planes_digest": planes_digest(model),
    }
    write_text(folder / "model.json", json.dumps(meaning, indent=1) + "\n")


def load_model(folder: Path) -> ClickModel:
    """Load a trained model, ready to score.

    Raises:
        CheckpointError: if the folder was written in another format, or the weights cannot be read
            or are not those that `model.json` speaks of.
    """
    meaning = json.loads((folder / "model.json").read_text())
    if meaning["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {meaning['format']!r}, wanted {FORMAT}")
    settings = from_plain(ClickModelSettings, meaning["settings"])
    model = ClickModel(FeatureSpec.from_dict(meaning["features"]), settings)
    try:
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise CheckpointError(
            f"{folder}/model.pt cannot be read ({reason}): put a whole copy in its place, or train "
            "the model again"
        ) from error
    if planes_digest(model) != meaning["planes_digest"]:
        raise CheckpointError(f"the hash planes of {folder}/model.pt are not those of model.json")
    return model.eval()
