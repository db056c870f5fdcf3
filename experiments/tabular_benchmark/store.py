"""Results as JSON lines: a file for each model and track, a line for each run."""

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from experiments.tabular_benchmark.data import Task

TRACKS = ("default", "tuned")


class Key(NamedTuple):
    """What is run once and only once: there is no seed, so there are no seeds to choose from."""

    set: str
    split: str
    model: str
    track: str


@dataclass(frozen=True)
class Record:
    """One run.

    Args:
        set: name of the data set.
        split: name of the split.
        model: name in the registry.
        track: `default` or `tuned`.
        task: of the set.
        split_hash: of the three parts' row numbers.
        metrics: on the test part.
        validation: primary metric on the inner validation part; None where it was learnt from.
        params: chosen on inner validation; empty in the default track.
        trials: that the choice was made from.
        fit_seconds: wall time of all fits, trials included.
        fit_process_seconds: the same in seconds of this process.
        predict_seconds: wall time for the test part.
        threads: that the model might use.
        device: that it was given.
        versions: of the packages behind it.
    """

    set: str
    split: str
    model: str
    track: str
    task: Task
    split_hash: str
    metrics: dict[str, float]
    validation: float | None
    params: dict[str, Any]
    trials: int
    fit_seconds: float
    fit_process_seconds: float
    predict_seconds: float
    threads: int
    device: str
    versions: dict[str, str]

    @property
    def key(self) -> Key:
        return Key(self.set, self.split, self.model, self.track)

    @property
    def label(self) -> str:
        """Name in tables: the model, and its track unless default."""
        return self.model if self.track == "default" else f"{self.model} {self.track}"


class Store:
    """Files of results that one process writes to; use it in a `with`.

    Raises:
        BlockingIOError: when another process writes the same model and track into the folder.
    """

    def __init__(self, folder: Path, models: Iterable[str], track: str) -> None:
        self._paths = {model: folder / f"{model}.{track}.jsonl" for model in models}
        self._files: dict[str, BinaryIO] = {}
        self.done: set[Key] = set()

    def __enter__(self) -> Self:
        for model, path in self._paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
            self._files[model] = file
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._close()
                raise BlockingIOError(f"another process writes to {path}") from error
            # What a kill left of a line is cut off, so that the next line begins on its own.
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
            self.done.update(record.key for record in read_file(path))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def add(self, record: Record) -> None:
        """Append one run and wait until it is on disk.

        Raises:
            ValueError: for a run that is there already.
        """
        if record.key in self.done:
            raise ValueError(f"{record.key} was run before")
        file = self._files[record.model]
        file.write(json.dumps(asdict(record), separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        self.done.add(record.key)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()


def read(folder: Path) -> list[Record]:
    """Read all runs of a folder."""
    return [record for path in sorted(folder.glob("*.jsonl")) for record in read_file(path)]


def read_file(path: Path) -> list[Record]:
    """Read one file; a last line without its end, which a writer is at or was killed at, is not.

    Raises:
        ValueError: names file and line of what is no record.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return records
