"""What a prepared data set says of itself, and the check that it is whole and unaltered."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from hashtab.features.errors import DataError
from hashtab.features.plain import build
from hashtab.features.schema import Schema
from hashtab.features.sources import SourceFile

FORMAT = 2
FILE = "manifest.json"
_AGAIN = "remove the folder and prepare the data again"


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One input of a model.

    Args:
        name: features of one name share their meaning, and their embedding.
        kind: ids (0 padding, 1 unknown, then known values) or a scaled number.
        size: number of ids; 1 for a number.
    """

    name: str
    kind: Literal["categorical", "numeric"]
    size: int


@dataclass(frozen=True, kw_only=True)
class Features:
    """The features of behaviours, candidates and requests, and the counters' names."""

    behaviour: tuple[Feature, ...]
    candidate: tuple[Feature, ...]
    context: tuple[Feature, ...]
    counters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """Sizes of one split: users with a sample, requests, samples and positives among them."""

    users: int
    requests: int
    samples: int
    positives: int


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """Size in bytes and sha256 of one file of the data set."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished data set.

    Args:
        format: version of the layout of the files.
        code: sha256 of the sources that wrote it.
        schema: the declaration, negative schemes and seeds included.
        schema_digest: of the declaration without the places of its files.
        sources: the input files.
        shards: number of user shards.
        users: with a behaviour or a sample.
        items: in the catalogue.
        behaviours: kept.
        duplicates: exact duplicate rows dropped, by log.
        missed_negatives: draws that found no free item, by scheme.
        history_quantiles: behaviours of a user, by percent of the users with fewer.
        splits: sizes by split.
        features: what a model reads.
        files: every file of the data set but this one.
        digest: of all of the above but `code` and the places of the sources.
    """

    format: int
    code: str
    schema: Schema
    schema_digest: str
    sources: tuple[SourceFile, ...]
    shards: int
    users: int
    items: int
    behaviours: int
    duplicates: dict[str, int]
    missed_negatives: dict[str, int]
    history_quantiles: dict[str, int]
    splits: dict[str, SplitInfo]
    features: Features
    files: dict[str, FileInfo]
    digest: str = ""

    def sealed(self) -> Self:
        """Return the manifest with its digest."""
        return dataclasses.replace(self, digest=self._content_digest())

    def _content_digest(self) -> str:
        plain = dataclasses.asdict(self)
        for name in ("digest", "code", "schema"):
            del plain[name]
        for source in plain["sources"]:
            source["path"] = Path(source["path"]).name
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the manifest as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check the manifest of a folder.

        Raises:
            DataError: if the folder holds no finished data set, one of another format version, or
                a manifest that was changed after it was written.
        """
        path = folder / FILE
        if not path.exists():
            raise DataError(
                f"{folder} holds no finished data set ({FILE} is missing); "
                "run pipelines/prepare.py, again if it was interrupted"
            )
        try:
            plain: dict[str, Any] = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON ({error}); {_AGAIN}") from error
        if plain.get("format") != FORMAT:
            raise DataError(
                f"{path} has format {plain.get('format')!r}, this version reads {FORMAT}; {_AGAIN}"
            )
        manifest: Self = build(cls, plain, FILE)
        if manifest.digest != manifest._content_digest():
            raise DataError(f"{path} was altered after it was written; {_AGAIN}")
        return manifest

    def check_files(self, folder: Path) -> None:
        """Refuse a data set with a file that is missing or of another size.

        Raises:
            DataError: naming the file.
        """
        for name, info in self.files.items():
            path = folder / name
            size = path.stat().st_size if path.exists() else None
            if size != info.size:
                raise DataError(f"{path} should hold {info.size} bytes, found {size}; {_AGAIN}")
