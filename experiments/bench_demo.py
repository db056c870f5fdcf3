"""What `make demo` costs once the environment stands: seconds, and peak memory of all processes.

The demo runs in a fresh folder. Memory is the proportional set size, summed twice a second over the
process and all its descendants, so that pages shared by workers count once (Linux).

    python experiments/bench_demo.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
_SECONDS_BETWEEN_SAMPLES = 0.5


def memory_bytes(process: psutil.Process) -> int:
    """Sum the proportional set size of a process and its descendants; ended ones count nothing."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total


def main() -> None:
    """Run the demo, follow it, print what it cost."""
    with tempfile.TemporaryDirectory(prefix="bench-demo-") as folder:
        begun, peak = time.perf_counter(), 0
        demo = subprocess.Popen([sys.executable, str(ROOT / "pipelines" / "demo.py")], cwd=folder)
        while demo.poll() is None:
            peak = max(peak, memory_bytes(psutil.Process(demo.pid)))
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
        seconds = time.perf_counter() - begun
    if demo.returncode:
        raise SystemExit(f"error: the demo ended with exit code {demo.returncode}")
    cores = psutil.cpu_count()
    print(f"\n{cores} cores: {seconds:.0f} s, peak of all processes {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
