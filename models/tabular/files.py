"""Fitted estimators in a folder: weights as safetensors, all else as JSON; nothing is executed."""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 2
_WEIGHTS, _SETTINGS = "weights.safetensors", "estimator.json"
_ARRAY, _FLOAT, _PAIRS = "!array", "!float", "!pairs"


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
        text = json.dumps({"format": FORMAT, **_plain(content)}, indent=1, allow_nan=False)
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
    return _restored(content), load_file(folder / _WEIGHTS)


def _plain(value: Any) -> Any:
    """Return `value` as JSON knows it; arrays, dicts by other keys and NaN keep their kind."""
    if isinstance(value, np.ndarray):
        return {_ARRAY: _plain(value.tolist()), "dtype": value.dtype.str}
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if isinstance(value, Mapping):
        pairs = {_plain(k): _plain(v) for k, v in value.items()}
        if all(isinstance(key, str) and key[:1] != "!" for key in pairs):
            return pairs
        return {_PAIRS: list(pairs.items())}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(part) for part in value]
    if not isinstance(value, dict):
        return value
    if _ARRAY in value:
        return np.array(_restored(value[_ARRAY]), dtype=value["dtype"])
    if _FLOAT in value:
        return float(value[_FLOAT])
    pairs = value[_PAIRS] if _PAIRS in value else value.items()
    return {key: _restored(part) for key, part in pairs}
