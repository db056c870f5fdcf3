"""What an index of items says of itself, and the check that it is whole and of one bundle."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from hashtab.features.errors import DataError
from hashtab.features.manifest import FileInfo
from hashtab.features.plain import build
from hashtab.features.sources import sha256
from hashtab.features.storage import write_text
from hashtab.serving.retrieval.errors import RetrievalError

FORMAT = 1
MANIFEST, ITEMS, SPACE = "manifest.json", "items.faiss", "space.npz"
IVF, FLAT = "ivf", "flat"  # kinds
AGAIN = "remove the folder and build it again with pipelines/build_index.py"


@dataclass(frozen=True, kw_only=True)
class Recall:
    """How much of what exact search finds the index finds.

    Args:
        value: mean share, over users, of exact search's items that the index found as well.
        at: items that were asked for.
        users: that were asked for, none of whom chose `nprobe`.
        sample: what the users are.
        seen_excluded: whether the items that each user had met were left out of both.
    """

    value: float
    at: int
    users: int
    sample: str
    seen_excluded: bool


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """All that a process needs to know of an index.

    Args:
        format: version of the layout of the files.
        fingerprint: of the bundle, 16 hex digits; user tables of another one do not fit.
        bundle_digest: of the bundle that the items were encoded with.
        data_digest: of the data set that says how often items were met; None where none does.
        as_of: microseconds since 1970 UTC; what had happened strictly before it was counted.
        items: in the index, all of the catalogue in its order.
        size: components of a vector.
        kind: "ivf", cells of which the nearest are searched, or "flat", exact search.
        metric: by which items are ranked.
        nlist: cells.
        nprobe: cells that a search looks into, the fewest that reach the recall wanted.
        recall: against exact search.
        seconds: that building took.
        versions: of the libraries that built it.
        files: every file of the index but this one.
        digest: of all of the above but the seconds.
    """

    format: int
    fingerprint: str
    bundle_digest: str
    data_digest: str | None
    as_of: int | None
    items: int
    size: int
    kind: str
    metric: str
    nlist: int
    nprobe: int
    recall: Recall
    seconds: float
    versions: dict[str, str]
    files: dict[str, FileInfo]
    digest: str = ""

    def write(self, folder: Path) -> "IndexManifest":
        """Write the manifest of the files that are there; returns it with files and digest."""
        files = {
            name: FileInfo(size=(folder / name).stat().st_size, sha256=sha256(folder / name))
            for name in (ITEMS, SPACE)
        }
        whole = dataclasses.replace(self, files=files)
        sealed = dataclasses.replace(whole, digest=whole._content_digest())
        write_text(folder / MANIFEST, json.dumps(dataclasses.asdict(sealed), indent=1) + "\n")
        return sealed

    @classmethod
    def read(cls, folder: Path) -> "IndexManifest":
        """Read the manifest of an index and hold its files against it.

        Raises:
            RetrievalError: if there is none, or a file is missing or was altered.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise RetrievalError(
                f"{folder} holds no index of items ({MANIFEST} is missing); make one with "
                "pipelines/build_index.py"
            )
        try:
            plain = json.loads(path.read_text())
            found = plain.get("format")
            if found != FORMAT:
                raise RetrievalError(
                    f"{path} has format {found!r}, this version reads {FORMAT}; {AGAIN}"
                )
            manifest: IndexManifest = build(cls, plain, MANIFEST)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, DataError) as error:
            raise RetrievalError(f"{path} is no manifest of an index ({error}); {AGAIN}") from error
        if manifest.digest != manifest._content_digest():
            raise RetrievalError(f"{path} was altered after it was written; {AGAIN}")
        manifest._check_files(folder)
        return manifest

    def _check_files(self, folder: Path) -> None:
        for name, info in self.files.items():
            path = folder / name
            if not path.is_file():
                raise RetrievalError(f"{path} is missing from its index; {AGAIN}")
            if path.stat().st_size != info.size or sha256(path) != info.sha256:
                raise RetrievalError(f"{path} is not the file that was built; {AGAIN}")

    def _content_digest(self) -> str:
        plain = dataclasses.asdict(self)
        del plain["digest"], plain["seconds"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
