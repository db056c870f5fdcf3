"""Follows an alias of MLflow's registry through a child process, which alone imports MLflow."""

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

_RESTART_S = 1.0, 60.0  # first and longest wait before a follower that ended is started again
_END_S = 5.0
_LONGEST_LINE = 1 << 24  # bytes


class Told(msgspec.Struct, frozen=True):
    """What is known of an alias now.

    Args:
        folder: that the bundle it names was brought to.
        version: of the registered model.
        error: why it cannot be said what it names; what it named before is still good.
    """

    folder: str | None = None
    version: str | None = None
    error: str | None = None


def is_alias(bundle: str) -> bool:
    """Say whether a bundle is named by the registry, and not by its folder."""
    return bundle.startswith("models:")


async def follow_alias(bundle: str, tracking_uri: str) -> AsyncGenerator[Told, None]:
    """Say what an alias names, now and whenever that changes; close it to end the child process.

    Args:
        bundle: `models:/name@alias`.
        tracking_uri: of MLflow.
    """
    wait_s = _RESTART_S[0]
    while True:
        async with _follower(bundle, tracking_uri) as process:
            assert process.stdout is not None
            async for line in process.stdout:
                # A library may print to standard output as well.
                with contextlib.suppress(msgspec.MsgspecError):
                    yield msgspec.json.decode(line, type=Told)
                    wait_s = _RESTART_S[0]
        yield Told(error=f"the follower of {bundle} ended; it is started again")
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _RESTART_S[1])


@contextlib.asynccontextmanager
async def _follower(bundle: str, tracking_uri: str) -> AsyncIterator[Process]:
    command = [sys.executable, "-m", "hashtab.pipelines.follow", "--bundle", bundle]
    command += ["--tracking_uri", tracking_uri, "--parent", str(os.getpid())]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, limit=_LONGEST_LINE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _END_S)
