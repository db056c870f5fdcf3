"""Brings a process from the bundle that it serves to the one that it should serve."""

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec

from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import FILE, BundleManifest
from hashtab.serving.retrieval import index_beside
from hashtab.serving.scorer import metrics
from hashtab.serving.scorer.champion import Served
from hashtab.serving.scorer.coverage import CoverageError, check_coverage
from hashtab.serving.scorer.desired import Desired, StateFolder
from hashtab.serving.scorer.tables import Tables
from hashtab.serving.store import StoreError

_POLL_S = 0.2
_RETRY_S = 0.5, 30.0  # after a bundle that could not be served: first wait, longest wait

_LOG = logging.getLogger(__name__)


class Waiting(msgspec.Struct, frozen=True):
    """A bundle that should be served and cannot be yet.

    Args:
        folder: of the bundle.
        version: number in the registry; None where there is none.
        reason: why it is not served.
    """

    folder: str
    version: str | None
    reason: str


class Swapper:
    """Opens bundles beside the one that is served, and puts them in use if they can be.

    Args:
        state: where the desired bundle is named and copies of bundles are kept.
        tables: whose coverage is checked.
        coverage: share of users who must have a table of the new model.
        current: gives the generation in use.
        use: takes the new one, between two requests.
    """

    def __init__(
        self,
        state: StateFolder,
        tables: Tables,
        coverage: float,
        current: Callable[[], Served | None],
        use: Callable[[Served], None],
    ) -> None:
        self._state = state
        self._tables = tables
        self._coverage = coverage
        self._current = current
        self._use = use
        self._used: Desired | None = None
        self._opened: tuple[Desired, Served] | None = None  # waits for its tables
        self._worker = ThreadPoolExecutor(1, "bundle")
        self._turn = asyncio.Lock()
        self.waiting: Waiting | None = None

    async def follow(self) -> None:
        """Serve what is desired, until cancelled."""
        tried, wait_s, again_s = None, _RETRY_S[0], 0.0
        while True:
            desired = self._state.desired()
            if desired != tried:
                tried, wait_s, again_s = desired, _RETRY_S[0], 0.0
            if desired == self._used:
                self.waiting = None
            if desired not in (None, self._used) and time.monotonic() >= again_s:
                with suppress(BundleError, CoverageError):
                    async with self._turn:
                        if self._state.desired() == desired:  # an admin may have been faster
                            await self._bring(desired)
                again_s = time.monotonic() + wait_s
                wait_s = min(2 * wait_s, _RETRY_S[1])
            await asyncio.sleep(_POLL_S)

    async def bring(self, desired: Desired) -> None:
        """Open a bundle and put it in use; what was served stays if that fails.

        Raises:
            BundleError: if it cannot be used.
            CoverageError: if too many users have no table of it.
        """
        async with self._turn:
            await self._bring(desired)

    async def _bring(self, desired: Desired) -> None:
        loop = asyncio.get_running_loop()
        try:
            served = await loop.run_in_executor(self._worker, self._open, desired)
        except BundleError as error:
            metrics.SWAP_FAILURES.labels("bundle").inc()
            if self._state.desired() == desired:  # else who asked for it alone need know
                self._wait(desired, error)
            raise
        except CoverageError as error:
            metrics.SWAP_FAILURES.labels("coverage").inc()
            self._wait(desired, error)
            raise
        before = self._current()
        self._use(served)
        # What was desired may have been unreadable, without a digest, when it was named.
        self._used = msgspec.structs.replace(desired, digest=served.model.digest)
        self._opened, self.waiting = None, None
        _report(before, served)

    def _wait(self, desired: Desired, error: Exception) -> None:
        waiting = Waiting(desired.folder, desired.version, str(error))
        if waiting != self.waiting:
            _LOG.error("%s is not served: %s", desired.folder, error)
        self.waiting = waiting

    def _open(self, desired: Desired) -> Served:
        if self._opened is None or self._opened[0] != desired:
            self._opened = None
            self._opened = desired, self._open_copy(Path(desired.folder), desired.version)
        served, before = self._opened[1], self._current()
        if before is not None:
            self._check_coverage(before, served)
        self._tables.look_for_tables(served.layout.fingerprint)
        return served

    def _open_copy(self, folder: Path, version: str | None) -> Served:
        copy = folder
        try:
            copy = self._copy(folder)
            return Served.open(copy, version, index_beside(folder))
        except Exception as error:  # whatever a bundle may bring about, the present one serves on
            if copy != folder:
                shutil.rmtree(copy, ignore_errors=True)
            reason = str(error) if isinstance(error, BundleError) else f"{folder}: {error!r}"
            raise BundleError(reason.replace(str(copy), str(folder))) from error

    def _check_coverage(self, before: Served, after: Served) -> None:
        if not self._tables.named or not after.reads_history:
            return
        fingerprints = before.layout.fingerprint, after.layout.fingerprint
        if fingerprints[0] == fingerprints[1]:
            return
        try:
            with self._tables.patient() as store:
                check_coverage(store, *fingerprints, self._coverage)
        except StoreError as error:
            raise CoverageError(
                f"the store cannot say whether it has the tables: {error}"
            ) from error

    def _copy(self, folder: Path) -> Path:
        """Copy a bundle to where nobody writes: onnxruntime maps weights, and reads them later."""
        manifest = BundleManifest.read(folder)
        kept = self._state.bundles / manifest.digest
        if kept.exists():
            return kept
        building = self._state.bundles / f".{manifest.digest}.{os.getpid()}.tmp"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        for name in (FILE, *manifest.files):
            if (folder / name).is_file():  # of one that is not, opening says so
                (building / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, building / name)
        if BundleManifest.read(building).digest != manifest.digest:
            shutil.rmtree(building, ignore_errors=True)
            raise BundleError(f"{folder} was replaced while it was read; it is read again")
        with suppress(OSError):  # another process of the server was faster
            building.rename(kept)
        shutil.rmtree(building, ignore_errors=True)
        self._forget_others(kept)
        return kept

    def _forget_others(self, kept: Path) -> None:
        """Remove copies that are not served; files that a process has mapped stay readable to it.

        A process that is about to open one of them fails and copies it again.
        """
        for other in self._state.bundles.iterdir():
            if other != kept and not other.name.startswith("."):
                shutil.rmtree(other, ignore_errors=True)

    def close(self) -> None:
        """Wait for a bundle that is being opened."""
        self._worker.shutdown()


def _report(before: Served | None, served: Served) -> None:
    metrics.SWAPS.inc()
    if before is not None:
        metrics.MODEL.labels(*_labels(before)).set(0)
    metrics.MODEL.labels(*_labels(served)).set(1)
    fields = msgspec.to_builtins(served.model) | {"run": served.manifest.run}
    _LOG.info("serves a model", extra={"fields": fields})


def _labels(served: Served) -> tuple[str, str, str]:
    model = served.model
    return model.version, model.digest, model.fingerprint
