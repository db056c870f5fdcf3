"""Where Ray's processes come from: a cluster that is there, or one of our own meanwhile."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hashtab.pipelines.command_line import SettingsError

ROOT = Path(__file__).resolve().parent.parent
# Bound to this address, a cluster of our own cannot be reached from outside this machine.
LOOPBACK = "127.0.0.2"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


_QUIETLY: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
_PATIENCE_S = 5.0


@contextmanager
def cluster(cores: int, address: str | None, *, gpus: int = 0) -> Iterator[None]:
    """Join the cluster that is named, or run one of our own meanwhile.

    In a process that is connected to Ray already, that connection is used and left open.

    Args:
        cores: of a cluster of our own; 0 when all work is done in this process, without Ray.
        address: of a cluster that is there; by default the one that RAY_ADDRESS names, as within
            `ray job submit`, if any.
        gpus: that the work needs at a time.

    Raises:
        SettingsError: if there is no cluster to join, or this machine has too few GPUs for the
            work that is to be done on it.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if cores == 0:
        _check_gpus(gpus)
        yield
        return
    import ray  # slow to import: --help and bad settings need not wait for it

    if ray.is_initialized():
        _say_what_lacks(cores, gpus)
        yield
        return
    if address:
        _join(address)
        _say_what_lacks(cores, gpus)
    else:
        _check_gpus(gpus)
        _start(cores)
    try:
        yield
    finally:
        ray.shutdown()


def _check_gpus(wanted: int) -> None:
    if not wanted:
        return
    import torch  # slow to import, and preparation needs none of it

    found = torch.cuda.device_count()
    if found < wanted:
        raise SettingsError(
            f"--gpu wants one GPU a worker: {wanted} needed, {found} on this machine; "
            "leave --gpu out, give fewer --workers, or the --address of a cluster"
        )


def _start(cores: int) -> None:
    import ray

    # Inherited by Ray's processes, which would otherwise run an installed copy or none.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    ray.init(
        address="local",
        num_cpus=cores,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _node_ip_address=LOOPBACK,
        **_QUIETLY,
    )


def _join(address: str) -> None:
    import ray

    try:
        _knock(address)
        ray.init(address=address, runtime_env=_source_to_send(), **_QUIETLY)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        raise SettingsError(
            f"the Ray cluster {address} cannot be joined ({' '.join(str(error).split())}): start "
            "it, or give another --address; without one and RAY_ADDRESS, this machine does the work"
        ) from error


def _knock(address: str) -> None:
    """Find out whether anyone listens, which Ray asks for minutes before it gives up."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_S).close()


def _say_what_lacks(cores: int, gpus: int) -> None:
    import ray

    found = ray.cluster_resources()
    has_cores, has_gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
    if has_cores < cores or has_gpus < gpus:
        print(
            f"{cores} cores and {gpus} GPUs are asked for, the cluster has {has_cores} and "
            f"{has_gpus}: what finds no place waits until there is more",
            file=sys.stderr,
        )


def _source_to_send() -> dict[str, str] | None:
    """Return a runtime environment with this checkout, unless the job brought one already."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    checkout = (ROOT / "hashtab").is_dir() and (ROOT / "models").is_dir()
    if not checkout or "working_dir" in job.get("runtime_env", {}):
        return None
    return {"working_dir": str(ROOT)}
