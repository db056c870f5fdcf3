"""What tests of several folders share; without a GPU Triton kernels run interpreted, on the CPU."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

if not torch.cuda.is_available():
    # Triton looks at this when it is imported, which any folder's tests may be the first to do.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _shared_gpu() -> Iterator[None]:
    """Leave the memory of a GPU to other processes of tests."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 kB; only a user who may mount one can meet a disk that is truly full."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(small)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a file system")
    yield small
    subprocess.run(["umount", str(small)], check=True)


class ByFolder(LoadScopeScheduling):  # type: ignore[misc]
    """Runs the files of pipelines in one process: two Ray clusters do not fit on one machine.

    Not by marks of groups, which pytest-xdist 3.8 writes into names that pytest 9.2 does not read.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "pipelines" if "pipelines" in Path(file).parts else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFolder | None:
    """Say which tests must share a process, where there are several."""
    return ByFolder(config, log) if config.getoption("dist") == "loadscope" else None
