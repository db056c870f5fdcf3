"""How the first worker tells the driver of its progress: a file that grows, read as it grows.

The storage folder is the one thing that workers and driver share on every kind of cluster, so this
needs no process of its own, and what it says is kept.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hashtab.pipelines.checkpoints import Progress

_SECONDS_BETWEEN_STEPS = 0.5


@dataclass
class Teller:
    """Writes events; most steps are left out, the rest comes about twice a second.

    Args:
        path: of the file.
        epochs: of the training at most.
    """

    path: Path
    epochs: int
    _last: float = 0.0

    def __call__(self, event: str, progress: Progress) -> None:
        """Tell of a start, a step or a finished epoch."""
        now = time.monotonic()
        if event == "step" and now - self._last < _SECONDS_BETWEEN_STEPS:
            return
        self._last = now
        record: dict[str, Any] = {
            "event": event,
            "epoch": progress.epoch,
            "step": progress.step,
            "steps": progress.batches * self.epochs,
            "batches": progress.batches,
        }
        if event == "step":
            record["loss"] = progress.loss / progress.samples
            record["samples_per_s"] = progress.samples / progress.seconds
            left = record["steps"] - record["step"]
            record["seconds_left"] = left * progress.seconds / progress.batch
        else:
            record["epochs"] = [asdict(epoch) for epoch in progress.epochs]
            record["best"] = progress.best
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Tail:
    """Reads what is appended to a file from now on.

    Args:
        path: of the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """Return the records that were completed since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return []
        self._offset += len(whole) + 1
        return [json.loads(line) for line in whole.splitlines()]
