"""Runs one task for each of many shards, in this process or as Ray tasks."""

from collections.abc import Callable, Iterable

from tqdm import tqdm

Task = Callable[[int], object]


def run_shards(task: Task, shards: Iterable[int], workers: int) -> None:
    """Run `task` for every shard; what a shard made lies where the task put it.

    Args:
        task: can be sent to another process; does nothing for a shard that is complete.
        shards: numbers of the shards.
        workers: 0 runs them in this process; more run so many at a time on the Ray cluster that is
            open, where a shard whose worker was killed is begun again.

    Raises:
        Exception: what a task raised.
    """
    if workers:
        _on_ray(task, list(shards), workers)
        return
    for shard in tqdm(list(shards), desc="shards", unit="shard"):
        task(shard)


def _on_ray(task: Task, waiting: list[int], at_a_time: int) -> None:
    import ray  # slow to import, and not needed by most

    remote = ray.remote(num_cpus=1, max_retries=3)(_call)
    running: list[ray.ObjectRef] = []
    with tqdm(total=len(waiting), desc="shards", unit="shard") as progress:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                running.append(remote.remote(task, waiting.pop(0)))
            done, running = ray.wait(running)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            progress.update(len(done))


def _call(task: Task, shard: int) -> None:
    task(shard)
