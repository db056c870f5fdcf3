"""Follows a folder or a registry's alias: one process of a server does, and tells the others."""

import asyncio
import contextlib
import logging
import math
from pathlib import Path

from hashtab.features.storage import exclusive
from hashtab.serving.alias import follow_alias
from hashtab.serving.scorer import metrics
from hashtab.serving.scorer.desired import Desired, Followed, StateFolder
from hashtab.serving.scorer.settings import ScorerSettings

_POLL_S = 1.0

_LOG = logging.getLogger(__name__)


async def follow(settings: ScorerSettings, state: StateFolder) -> None:
    """Name in the state folder what is to be served, until cancelled.

    Other processes wait until the one that does so has ended.
    """
    if not settings.registered:
        metrics.REGISTRY_UP.set(math.nan)
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
    async with contextlib.aclosing(follow_alias(settings.bundle, settings.tracking_uri)) as heard:
        async for told in heard:
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
