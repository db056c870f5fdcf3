"""What tests of several folders share."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


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


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run pipelines in one process, since two Ray clusters do not fit on one machine."""
    for item in items:
        folder = Path(item.nodeid.partition("::")[0])
        group = "pipelines" if "pipelines" in folder.parts else str(folder)
        item.add_marker(pytest.mark.xdist_group(group))
