"""Runs one task for each of many shards, in this process or as Ray tasks."""

import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm

from hashtab.pipelines.command_line import SettingsError

Task = Callable[[int], Iterable[str] | None]

_RETRIES = 3


def run_shards(task: Task, shards: Iterable[int], workers: int) -> None:
    """Run `task` for every shard; what a shard made lies where the task put it.

    Args:
        task: can be sent to another process; does nothing for a shard that is complete. Lines that
            it returns are for the person at this process, and go to stderr.
        shards: numbers of the shards.
        workers: 0 runs them in this process; more run so many at a time on the Ray cluster that is
            open, where a shard whose worker was killed is begun again.

    Raises:
        SettingsError: if one shard's worker is killed again and again.
        Exception: what a task raised.
    """
    if workers:
        _on_ray(task, list(shards), workers)
        return
    for shard in tqdm(list(shards), desc="shards", unit="shard"):
        _say(task(shard))


def _on_ray(task: Task, waiting: list[int], at_a_time: int) -> None:
    import ray  # slow to import, and not needed by most

    remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(_call)
    running: list[ray.ObjectRef] = []
    with tqdm(total=len(waiting), desc="shards", unit="shard") as progress:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                running.append(remote.remote(task, waiting.pop(0)))
            done, running = ray.wait(running)
            try:
                for said in ray.get(done):
                    _say(said)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise SettingsError(
                    f"a worker was killed {_RETRIES + 1} times over one shard "
                    f"({type(error).__name__}): is there memory for so many --workers? "
                    "The same command goes on"
                ) from error
            progress.update(len(done))


def _call(task: Task, shard: int) -> list[str]:
    return list(task(shard) or ())


def _say(lines: Iterable[str] | None) -> None:
    for line in lines or ():
        tqdm.write(line, file=sys.stderr)
