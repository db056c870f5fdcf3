"""Fitted estimators in a folder: weights as safetensors, all else as JSON; nothing is executed."""

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_WEIGHTS, _SETTINGS = "weights.safetensors", "estimator.json"


def save(folder: Path, content: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write a folder in one step: it is there whole, or not at all.

    Raises:
        FileExistsError: `folder` exists and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty: remove it or choose another")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        part = Path(name) / "part"
        part.mkdir()
        save_file({k: v.contiguous() for k, v in weights.items()}, part / _WEIGHTS)
        text = json.dumps({"format": FORMAT, **content}, indent=1, allow_nan=False)
        (part / _SETTINGS).write_text(text)
        part.replace(folder)


def load(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError: there is no estimator in `folder`.
        ValueError: it is of another class or format.
    """
    if not (folder / _SETTINGS).exists():
        raise FileNotFoundError(f"no estimator in {folder}: {_SETTINGS} is missing")
    content: dict[str, Any] = json.loads((folder / _SETTINGS).read_text())
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has format {content.get('format')}, this version reads {FORMAT}"
        )
    if content["kind"] != kind:
        raise ValueError(f"{folder} holds a {content['kind']}, load it with {content['kind']}.load")
    return content, load_file(folder / _WEIGHTS)
