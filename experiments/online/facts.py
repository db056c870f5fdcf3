"""What a measurement was made on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("onnxruntime", "numpy", "lmdb", "starlette", "uvicorn", "msgspec", "fastapi")


def machine() -> dict[str, str]:
    """Return cores, processor, load and versions; no name of the machine."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "processor": names[0] if names else platform.machine(),
        "load at the begin": f"{os.getloadavg()[0]:.1f}",
        "versions": f"Python {platform.python_version()}, {packages}",
    }
