"""What a bundle says of itself, and the check that it is whole, unaltered and of one piece."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from hashtab.features.errors import DataError
from hashtab.features.manifest import Features, FileInfo
from hashtab.features.plain import build
from hashtab.features.sources import sha256
from hashtab.features.storage import write_text
from hashtab.serving.errors import BundleError, BundleFormatError
from hashtab.serving.store import RecordLayout

FORMAT = 3
FILE = "manifest.json"
CLICKS, TABLE = "clicks", "table"  # kinds of models
_SCORED_BY = {CLICKS: "score_batch.py", TABLE: "score_table.py"}
ENCODERS, CATALOGUE, GOLDEN = "encoders.json", "catalogue.arrow", "golden.npz"
ENCODER, SCORER, WEIGHTS = "encoder.onnx", "scorer.onnx", "weights.bin"
ITEMS, ONLINE = "items.onnx", "online.onnx"  # the scorer in two halves
_AGAIN = "export the model again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What every bundle says of itself, whatever its model.

    Args:
        format: version of the layout of the files.
        kind: of the model, which says what else the manifest holds and what serves it.
        run: name of the training run.
        model_digest: of the weights and settings that were exported.
        versions: of the libraries that wrote it.
        data_digest: of the data that the model was trained on.
        metrics: of the trained model, split -> metric -> value.
        files: every file of the bundle but this one.
        digest: of all of the above.
    """

    KIND: ClassVar[str]

    format: int
    kind: str
    run: str
    model_digest: str
    versions: dict[str, str]
    data_digest: str
    metrics: dict[str, dict[str, float]]
    files: dict[str, FileInfo]
    digest: str = ""

    @property
    def tags(self) -> dict[str, str]:
        """What a registry shows of the bundle."""
        return {"kind": self.kind, "data_digest": self.data_digest, "run": self.run}

    def write(self, folder: Path) -> Self:
        """Write the manifest of the files that are there; returns it with files and digest."""
        files = {
            str(path.relative_to(folder)): FileInfo(size=path.stat().st_size, sha256=sha256(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != FILE
        }
        whole = dataclasses.replace(self, files=files)
        sealed = dataclasses.replace(whole, digest=whole._content_digest())
        write_text(folder / FILE, json.dumps(dataclasses.asdict(sealed), indent=1) + "\n")
        return sealed

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a bundle.

        Raises:
            BundleError: if there is none, or it is of another format or was altered.
        """
        path = folder / FILE
        plain = _read_plain(folder)
        kind = plain.get("kind", cls.KIND)
        if kind != cls.KIND:
            raise BundleError(
                f"{folder} holds a model of kind {kind!r}, where one of kind {cls.KIND!r} is wanted"
                + (f"; pipelines/{_SCORED_BY[kind]} scores it" if kind in _SCORED_BY else "")
            )
        try:
            manifest: Self = build(cls, plain, FILE)
        except DataError as error:
            raise BundleError(f"{path} is no manifest of a bundle ({error}); {_AGAIN}") from error
        if manifest.digest != manifest._content_digest():
            raise BundleError(f"{path} was altered after it was written; {_AGAIN}")
        return manifest

    def check_files(self, folder: Path) -> None:
        """Refuse a bundle with a file that is missing, altered or of another bundle.

        Raises:
            BundleError: naming the file.
        """
        for name, info in self.files.items():
            path = folder / name
            if not path.is_file():
                raise BundleError(f"{path} is missing from its bundle; copy it whole, or {_AGAIN}")
            if path.stat().st_size != info.size:
                raise BundleError(
                    f"{path} should hold {info.size} bytes, found {path.stat().st_size}; "
                    f"copy the bundle whole, or {_AGAIN}"
                )
            if sha256(path) != info.sha256:
                raise BundleError(
                    f"{path} is not the file that this bundle was written with: it was altered, "
                    f"or comes from another bundle; {_AGAIN}"
                )

    def _content_digest(self) -> str:
        plain = dataclasses.asdict(self)
        del plain["digest"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """Shape of a user's table, int32 in units of 2^-16; groups 0 where the model reads none."""

    groups: int
    buckets: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What the export's comparison of torch and onnxruntime came to.

    Args:
        requests: compared.
        scores: compared.
        largest_difference: between two scores.
        codes: hash codes compared, all equal.
    """

    requests: int
    scores: int
    largest_difference: float
    codes: int


@dataclass(frozen=True, kw_only=True)
class BundleManifest(Manifest):
    """All that a process needs to know to serve a click model.

    Args:
        encoder: name of the history encoder.
        fingerprint: 16 hex digits, of all that decides what a user's record holds.
        planes_digest: sha256 of the hash planes.
        table: shape of a user's table.
        recent: latest behaviours that the scorer reads one by one.
        history_limit: latest behaviours that the table holds; all when None.
        counts_behaviours: whether the scorer reads how many behaviours the table holds.
        features: of behaviours, candidates and requests, and the counters.
        text_users: whether users are text, and not integers; "007" is then not 7.
        text_items: the same of items.
        item: name of the item feature.
        items: features that the catalogue knows of an item.
        time_features: made of the request's time.
        parity: of torch and onnxruntime.
    """

    KIND: ClassVar[str] = CLICKS

    encoder: str
    fingerprint: str
    planes_digest: str
    table: TableShape
    recent: int
    history_limit: int | None
    counts_behaviours: bool
    features: Features
    text_users: bool
    text_items: bool
    item: str
    items: tuple[str, ...]
    time_features: tuple[str, ...]
    parity: Parity

    @property
    def layout(self) -> RecordLayout:
        """What a user's record holds."""
        dtypes = {"categorical": "int32", "numeric": "float32"}
        recent = self.features.behaviour if self.recent else ()
        return RecordLayout(
            fingerprint=bytes.fromhex(self.fingerprint),
            groups=self.table.groups,
            buckets=self.table.buckets,
            size=self.table.size,
            recent=self.recent,
            features=tuple((f.name, dtypes[f.kind]) for f in recent),  # type: ignore[misc]
            counters=self.features.counters,
        )

    @property
    def tags(self) -> dict[str, str]:
        """What a registry shows of the bundle."""
        return super().tags | {"fingerprint": self.fingerprint}

    @property
    def side(self) -> tuple[str, ...]:
        """Features of a behaviour that are not its item's."""
        return tuple(f.name for f in self.features.behaviour if f.name not in self.items)


def read_kind(folder: Path) -> str:
    """Return what kind of model a bundle holds, without a look at its other files.

    Raises:
        BundleError: if there is no bundle, or it is of another format.
    """
    return str(_read_plain(folder).get("kind"))


def _read_plain(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.is_file():
        raise BundleError(
            f"{folder} holds no bundle ({FILE} is missing); make one with pipelines/export.py"
        )
    try:
        plain: dict[str, Any] = json.loads(path.read_text())
        if plain.get("format") != FORMAT:
            raise BundleFormatError(
                f"{path} has format {plain.get('format')!r}, this version reads {FORMAT}; {_AGAIN}"
            )
    except (ValueError, RecursionError, AttributeError) as error:
        raise BundleError(f"{path} is no manifest of a bundle ({error}); {_AGAIN}") from error
    return plain
