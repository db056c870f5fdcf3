"""The folder of one run of any kind: who it belongs to, and what is done with it."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hashtab.features.storage import TEMPORARY, exclusive, write_text
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.settings import differences


@dataclass(frozen=True)
class RunFolder:
    """One training's folder and settings.

    Args:
        folder: absolute, named as the run.
        settings: a dataclass, with `tracking_uri` and `resume` among its fields.

    Attributes:
        work: what is done in the folder, in a word.
        script: that does it.
    """

    work: ClassVar[str] = "training"
    script: ClassVar[str] = "pipelines/train_sdim.py"

    folder: Path
    settings: Any

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def model(self) -> Path:
        """Folder of the trained model."""
        return self.folder / "model"

    @property
    def plots(self) -> Path:
        """Folder of the plots."""
        return self.folder / "plots"

    @property
    def begun(self) -> bool:
        """Whether a training was begun in this folder."""
        return self._owner.exists()

    @property
    def finished(self) -> bool:
        """Whether the training is over."""
        return self._result.exists()

    def read_result(self) -> Any:
        """Return what `write_result` stored."""
        return json.loads(self._result.read_text())

    def write_result(self, plain: Any) -> None:
        """Store plain data as the result; the run is finished from then on."""
        write_text(self._result, json.dumps(plain, indent=1) + "\n")

    def forget_result(self) -> None:
        """Remove the result: the run is not finished any more, and MLflow is to be told again."""
        self._result.unlink(missing_ok=True)
        if self.begun:
            self._write(self._record() | {"published": False})

    @property
    def tracked_as(self) -> str | None:
        """Id of the MLflow run, once there is one."""
        found: str | None = self._record()["mlflow_run_id"]
        return found

    @property
    def tracked_in(self) -> str:
        """Tracking URI of the store that holds the MLflow run, or is to hold it."""
        return str(self._record().get("tracking_uri") or self.settings.tracking_uri)

    def track_as(self, run_id: str, tracking_uri: str) -> None:
        """Remember the MLflow run and its store, so that a resumed training goes on in it."""
        self._write(self._record() | {"mlflow_run_id": run_id, "tracking_uri": tracking_uri})

    @property
    def published(self) -> bool:
        """Whether the training is over and MLflow knows all of it."""
        return self.begun and bool(self._record()["published"])

    def publish(self) -> None:
        """Remember that MLflow knows all."""
        self._write(self._record() | {"published": True})

    @property
    def _result(self) -> Path:
        return self.folder / "result.json"

    @property
    def _owner(self) -> Path:
        return self.folder / "run.json"

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self._owner.read_text())
        return record

    def _write(self, record: dict[str, Any]) -> None:
        write_text(self._owner, json.dumps(record, indent=1) + "\n")

    def refuse_another(self, identity: dict[str, Any]) -> None:
        """Refuse a folder in which something else was begun.

        Raises:
            SettingsError: naming what differs.
        """
        if not self.begun:
            return
        differ = differences(self._record()["identity"], identity)
        if differ:
            raise SettingsError(
                f"{self.folder} holds another {self.work}: {differ}; "
                "give its settings and data, or another --run_name"
            )

    def check_resume(self) -> None:
        """Refuse to go on with a run unasked, or to resume what was never begun.

        Raises:
            SettingsError: that tells the choices.
        """
        if self.settings.resume and not self.begun:
            raise SettingsError(f"nothing to resume: there is no {self.folder}")
        if self.begun and not self.settings.resume:
            state, what = ("finished", "show its result") if self.finished else ("begun", "go on")
            raise SettingsError(
                f"this {self.work} was {state} before, in {self.folder}: add --resume to {what}, "
                "or begin anew with another --run_name or --seed"
            )

    def make(self, identity: dict[str, Any]) -> None:
        """Make the folder of a new run; nothing where it is there."""
        if not self.begun:
            self._write({"identity": identity, "mlflow_run_id": None, "published": False})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the lock ends with it, however it ends.

        Files that a killed writer left without their names are removed.

        Raises:
            SettingsError: if another process is training this run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(self.folder / ".lock"))
            except BlockingIOError as error:
                raise SettingsError(
                    f"another process is training {self.folder}; wait for it or stop it"
                ) from error
            for stray in self.folder.rglob(TEMPORARY):
                stray.unlink(missing_ok=True)
            yield
