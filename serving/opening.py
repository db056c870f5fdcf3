"""Bundles of whatever kind."""

from pathlib import Path

from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import CLICKS, TABLE, BundleManifest, Manifest, read_kind
from hashtab.serving.table_bundle import TableBundle
from hashtab.serving.table_manifest import TableManifest

AnyBundle = Bundle | TableBundle

_BUNDLES: dict[str, type[Bundle] | type[TableBundle]] = {CLICKS: Bundle, TABLE: TableBundle}
_MANIFESTS: dict[str, type[Manifest]] = {CLICKS: BundleManifest, TABLE: TableManifest}


def open_any(folder: str | Path) -> AnyBundle:
    """Open a bundle of any kind, as its class does.

    Raises:
        BundleError: if it cannot be used.
    """
    return _BUNDLES[_kind(Path(folder))].open(folder)


def read_any(folder: Path) -> Manifest:
    """Read the manifest of a bundle of any kind.

    Raises:
        BundleError: if there is none, or it is of another format or was altered.
    """
    return _MANIFESTS[_kind(folder)].read(folder)


def _kind(folder: Path) -> str:
    kind = read_kind(folder)
    if kind not in _BUNDLES:
        known = ", ".join(_BUNDLES)
        raise BundleError(f"{folder} holds a model of kind {kind!r}; known: {known}")
    return kind
