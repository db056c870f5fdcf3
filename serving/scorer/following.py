"""Follows a folder or a registry's alias: one process of a server does, and tells the others."""

import asyncio
import contextlib
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from hashtab.features.storage import exclusive
from hashtab.serving.scorer import metrics
from hashtab.serving.scorer.desired import Desired, Followed, StateFolder
from hashtab.serving.scorer.settings import ScorerSettings

_POLL_S = 1.0
_RESTART_S = 1.0, 60.0  # first and longest wait before a follower that ended is started again
_END_S = 5.0

_LOG = logging.getLogger(__name__)


class Told(msgspec.Struct):
    """A line of `pipelines/follow.py`."""

    folder: str | None = None
    version: str | None = None
    error: str | None = None


async def follow(settings: ScorerSettings, state: StateFolder) -> None:
    """Name in the state folder what is to be served, until cancelled.

    Other processes wait until the one that does so has ended.
    """
    with contextlib.ExitStack() as stack:
        while True:
            with contextlib.suppress(BlockingIOError):
                stack.enter_context(exclusive(state.lock))
                break
            await asyncio.sleep(_POLL_S)
        if settings.registered:
            await _follow_alias(settings, state)
        else:
            await _follow_folder(Path(settings.bundle), state)


async def _follow_folder(folder: Path, state: StateFolder) -> None:
    while True:
        _name(state, Desired.of(folder))
        await asyncio.sleep(_POLL_S)


def _name(state: StateFolder, found: Desired) -> None:
    """Desire what is followed where it has changed: else an admin's choice would not last."""
    before = state.followed()
    if found != before.named:
        state.desire(found)
    if before != Followed(found):
        state.follow(Followed(found))


async def _follow_alias(settings: ScorerSettings, state: StateFolder) -> None:
    wait_s = _RESTART_S[0]
    while True:
        async with _follower(settings) as process:
            assert process.stdout is not None
            async for line in process.stdout:
                wait_s = _RESTART_S[0]
                _hear(state, line)
        _complain(state, f"the follower of {settings.bundle} ended; it is started again")
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _RESTART_S[1])


def _hear(state: StateFolder, line: bytes) -> None:
    try:
        told = msgspec.json.decode(line, type=Told)
    except msgspec.MsgspecError:
        return  # a library's word on standard output
    if told.folder is not None:
        metrics.REGISTRY_UP.set(1)
        _name(state, Desired.of(Path(told.folder), told.version))
    elif told.error is not None:
        _complain(state, told.error)


def _complain(state: StateFolder, problem: str) -> None:
    metrics.REGISTRY_UP.set(0)
    before = state.followed()
    if before.problem != problem:
        _LOG.warning("%s; the present model serves on", problem)
        state.follow(Followed(before.named, problem))


@contextlib.asynccontextmanager
async def _follower(settings: ScorerSettings) -> AsyncIterator[Process]:
    """A process that imports MLflow, which no process that scores does."""
    command = [sys.executable, "-m", "hashtab.pipelines.follow", "--bundle", settings.bundle]
    command += ["--tracking_uri", settings.tracking_uri, "--parent", str(os.getpid())]
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _END_S)
