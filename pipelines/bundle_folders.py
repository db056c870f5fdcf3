"""Folders of bundles of any kind: written whole or not at all, and never over another."""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from hashtab.features.sources import sha256
from hashtab.pipelines.command_line import SettingsError
from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import Manifest

LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")

Kind = TypeVar("Kind", bound=Manifest)


def bundle_at(
    target: Path, kind: type[Kind], model_digest: str, build: Callable[[Path], Kind]
) -> Kind:
    """Write a bundle, unless it is there already; nothing is left where `build` raises.

    Args:
        target: folder of the bundle.
        kind: of its manifest.
        model_digest: of the model that it is to hold.
        build: writes it into a folder.

    Returns:
        The manifest.

    Raises:
        SettingsError: if the target holds something else.
    """
    if target.exists() and not _is_empty(target):
        return _existing(target, kind, model_digest)
    building = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        manifest = build(building)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def _is_empty(target: Path) -> bool:
    return target.is_dir() and not any(target.iterdir())


def _existing(target: Path, kind: type[Kind], model_digest: str) -> Kind:
    """Return the manifest of a bundle that is there, if it is whole and of this model."""
    try:
        manifest = kind.read(target)
        if manifest.model_digest == model_digest:
            manifest.check_files(target)
            return manifest
    except BundleError as error:
        raise SettingsError(
            f"{error} (first remove {target}, or choose another --output)"
        ) from error
    raise SettingsError(f"{target} exists and holds another model; choose another --output")


def digest_of(files: Iterable[Path]) -> str:
    """Return one digest of the contents of several files, in their order."""
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what makes and reads a bundle."""
    return {"hashtab": version("hashtab"), **{name: version(name) for name in LIBRARIES}}
