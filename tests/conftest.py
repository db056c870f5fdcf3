"""What tests of several folders share; without a GPU Triton kernels run interpreted, on the CPU."""

import inspect
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

if not torch.cuda.is_available():
    # Triton looks at this when it is imported, which any folder's tests may be the first to do.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _replace_builtins_once() -> None:
    """Have Triton's interpreter look through its language once, not at each call of a function.

    What a kernel calls finds the functions of the language replaced already; to find that out took
    a third of the time of interpreted tests.
    """
    from triton.runtime import interpreter

    @cache
    def builtins(owner: Any) -> list[tuple[str, Any]]:
        members = inspect.getmembers(owner)
        return [member for member in members if interpreter.tl.core.is_builtin(member[1])]

    def replace(owner: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins(owner):
            if getattr(owner, name) is member:
                interpreter._patch_attr(owner, name, member, builder, scope)

    interpreter._patch_builtin = replace


if find_spec("triton"):
    _replace_builtins_once()


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
