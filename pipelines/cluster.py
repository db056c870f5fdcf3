"""Where Ray's processes come from: a cluster that is there, or one of our own meanwhile."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def cluster(cores: int, address: str | None) -> Iterator[None]:
    """Join the cluster that is named, or run one of our own meanwhile.

    In a process that is connected to Ray already, that connection is used and left open.

    Args:
        cores: of a cluster of our own; 0 when all work is done in this process, without Ray.
        address: of a cluster that is there; by default the one that RAY_ADDRESS names, as within
            `ray job submit`, if any.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if cores == 0:
        yield
        return
    import ray  # slow to import: --help and bad settings need not wait for it

    if ray.is_initialized():
        yield
        return
    common = {"logging_level": "ERROR", "log_to_driver": False}
    if address or "RAY_ADDRESS" in os.environ:
        ray.init(address=address, runtime_env=_source_to_send(), **common)
    else:
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
            **common,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _source_to_send() -> dict[str, str] | None:
    """Return a runtime environment with this checkout, unless the job brought one already."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    checkout = (ROOT / "hashtab").is_dir() and (ROOT / "models").is_dir()
    if not checkout or "working_dir" in job.get("runtime_env", {}):
        return None
    return {"working_dir": str(ROOT)}
