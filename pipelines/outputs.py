"""An output folder of scores in parts: each part whole or not at all, and the whole counted."""

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import polars as pl

from hashtab.features.errors import disk_errors
from hashtab.features.plain import build
from hashtab.features.sources import SourceFile, sha256
from hashtab.features.storage import TEMPORARY, exclusive, write_text
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.settings import differences
from hashtab.pipelines.shard_tasks import run_shards
from hashtab.serving.errors import RequestError

MANIFEST, SUCCESS = "_MANIFEST.json", "_SUCCESS"


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """One job, fixed before it begins; a part of it is scored by any process that sees its places.

    Args:
        bundle: folder.
        bundle_digest: of the bundle's manifest.
        requests: the files, as they were when the job began.
        count: of what is to be scored.
        rows: that a part holds, the last one's apart.
        output: folder.
    """

    bundle: str
    bundle_digest: str
    requests: tuple[SourceFile, ...]
    count: int
    rows: int
    output: str

    @abstractmethod
    def __call__(self, number: int) -> list[str]:
        """Score one part; does nothing where its file is there. Returns what is to be said."""

    @property
    @abstractmethod
    def decisive(self) -> dict[str, Any]:
        """What decides the scores; what may have moved is left out."""

    @property
    def parts(self) -> int:
        """Number of parts; one at least, so that no rows give a file with none."""
        return max(1, -(-self.count // self.rows))

    def part(self, number: int) -> Path:
        """Return the file of a part's scores."""
        return Path(self.output) / f"part-{number:05d}-of-{self.parts:05d}.parquet"

    @property
    def files(self) -> list[Path]:
        """The files of all parts."""
        return [self.part(number) for number in range(self.parts)]

    @property
    def asked(self) -> Path:
        """What is to be scored in one file; there until all is scored."""
        return Path(self.output) / "_requests.parquet"

    def requests_of(self, number: int) -> pl.DataFrame:
        """Return what a part is to score."""
        return pl.scan_parquet(self.asked).slice(number * self.rows, self.rows).collect()

    def to_json(self) -> str:
        """Return the job as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        job: Self = build(cls, json.loads(text), MANIFEST)
        return job


Kind = TypeVar("Kind", bound=Job)
Summary = TypeVar("Summary")


@dataclass(frozen=True)
class Output(Generic[Kind, Summary]):
    """An output folder of jobs of one kind.

    Args:
        folder: absolute.
        kind: of its jobs.
        summary: a dataclass, what a finished output holds.
        count: what the parts of a job hold; raises where one is missing or holds something else.
    """

    folder: Path
    kind: type[Kind]
    summary: type[Summary]
    count: Callable[[Kind], Summary]

    def score(
        self,
        job: Kind,
        write: Callable[[Path, int], int],
        workers: int,
        address: str | None,
        *,
        shown: Kind | None = None,
    ) -> Summary:
        """Score what is left of a job and return what the whole output holds.

        Args:
            job: that is asked for, without its count.
            write: writes what is to be scored into a file, with so many rows a group, and returns
                their number.
            workers: Ray tasks at a time; 0 scores in this process.
            address: of a Ray cluster.
            shown: the job as the manifest keeps it, if not as it is.

        Raises:
            SettingsError: if the folder holds another job, or cannot be written.
            RequestError: if it cannot be read, or what is to be scored cannot.
        """
        with self._only_writer(), disk_errors(self.folder):
            self._remove_strays()
            planned = self._plan(job, shown or job, write)
            if (self.folder / SUCCESS).exists():
                planned.asked.unlink(missing_ok=True)
                return self.verified()
            return self._finish(planned, workers, address)

    def _remove_strays(self) -> None:
        for stray in self.folder.glob(TEMPORARY):
            stray.unlink()

    @contextmanager
    def _only_writer(self) -> Iterator[None]:
        """Hold the folder, made where it is not there, for this process alone."""
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(self.folder / ".lock"))
            except BlockingIOError as error:
                raise SettingsError(
                    f"another process writes to {self.folder}; wait for it"
                ) from error
            except OSError as error:
                raise SettingsError(
                    f"output {self.folder} cannot be written ({error.strerror}): give another "
                    "--output, or change its permissions"
                ) from error
            yield

    def _plan(self, job: Kind, shown: Kind, write: Callable[[Path, int], int]) -> Kind:
        """Return the job of the folder, fixed in its manifest before anything is scored."""
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            planned = replace(job, count=write(job.asked, job.rows))
            write_text(manifest, replace(shown, count=planned.count).to_json())
            return planned
        begun = self._begun()
        differ = differences(begun.decisive, shown.decisive)
        if differ:
            raise SettingsError(
                f"{self.folder} holds the scores of another job: {differ}; give another --output, "
                "or remove it"
            )
        if not job.asked.exists() and not (self.folder / SUCCESS).exists():
            write(job.asked, job.rows)  # a part of a sealed output was removed, to be made again
        return replace(job, count=begun.count)

    def _begun(self) -> Kind:
        path = self.folder / MANIFEST
        try:
            return self.kind.from_json(path.read_text())
        except (OSError, ValueError) as error:
            raise RequestError(
                f"{path} cannot be read ({error}): remove {self.folder} and score again"
            ) from error

    def _finish(self, job: Kind, workers: int, address: str | None) -> Summary:
        """Score the parts that are not there, and seal the output."""
        left = [number for number, part in enumerate(job.files) if not part.exists()]
        if left:
            with cluster(workers, address):
                run_shards(job, left, workers)
            self._remove_strays()  # of workers that were killed while they wrote
        summary = self.count(job)
        files = {part.name: sha256(part) for part in job.files}
        sealed = {"summary": asdict(summary), "files": files}  # type: ignore[call-overload]
        write_text(self.folder / SUCCESS, json.dumps(sealed, indent=1) + "\n")
        job.asked.unlink(missing_ok=True)
        return summary

    def verified(self) -> Summary:
        """Count a finished output, and hold it, byte by byte, against what was written at its end.

        Raises:
            RequestError: if it is not finished, or naming the part that is missing or was altered.
        """
        sealed = self.folder / SUCCESS
        if not sealed.exists():
            raise RequestError(
                f"{self.folder} is not finished ({SUCCESS} is missing): run the command again"
            )
        try:
            plain = json.loads(sealed.read_text())
            said, files = build(self.summary, plain["summary"], SUCCESS), dict(plain["files"])
        except (ValueError, TypeError, KeyError) as error:
            raise RequestError(
                f"{sealed} was altered: remove {self.folder} and score again"
            ) from error
        for name, digest in files.items():
            path = self.folder / name
            if not path.exists() or sha256(path) != digest:
                what = "was altered or damaged" if path.exists() else "is missing"
                raise RequestError(f"{path} {what}: remove {self.folder} and score again")
        found = self.count(self._begun())
        if found != said:
            raise RequestError(f"{self.folder} holds {found}, but ended with {said}: score again")
        return found


def scan_parts(job: Job) -> pl.LazyFrame:
    """Return the scores of all parts.

    Raises:
        RequestError: if a part is missing.
    """
    for part in job.files:
        if not part.exists():
            raise RequestError(f"{part} is missing: run the same command again, without --verify")
    return pl.scan_parquet(job.files)


def unreadable(job: Job, error: pl.exceptions.PolarsError) -> RequestError:
    """Return the error of parts that polars cannot read."""
    reason = str(error).strip().splitlines()[0]
    return RequestError(
        f"the parts of {job.output} cannot be read ({reason}): remove the one that is damaged and "
        "run the same command again"
    )


def say_ignored(names: tuple[str, ...]) -> None:
    """Tell the person which columns no one reads."""
    if names:
        print(f"columns not read: {', '.join(names)}", file=sys.stderr)


def write_durably(target: Path, frame: pl.DataFrame) -> None:
    """Write Parquet by temporary name, sync and rename: a kill or a power cut leaves no half."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    frame.write_parquet(temporary)
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    temporary.replace(target)
