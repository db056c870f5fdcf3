"""Compilation at first use: no compiler, a broken one, several processes at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ATTEND = """
import torch, warnings
from hashtab.kernels import sdim
torch.manual_seed(0)
arguments = (torch.randn(9, 4), torch.tensor([0, 9]), torch.randn(1, 2, 4), torch.randn(4, 6), 3)
"""


def run(code: str, **environment: str) -> str:
    """Run code in a fresh process and return what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", ATTEND + code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("compiler", ["missing", "broken"])
def test_without_a_working_compiler(tmp_path: Path, compiler: str) -> None:
    if compiler == "broken":
        broken = tmp_path / "cc"
        broken.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
        broken.chmod(0o755)
    code = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = sdim.attend(*arguments), sdim.attend(*arguments)
assert torch.equal(first, sdim.attend(*arguments, impl="reference"))
print([str(w.message) for w in caught if "native code is not available" in str(w.message)])
try:
    sdim.attend(*arguments, impl="native")
except RuntimeError as error:
    print(error)
"""
    path = f"{tmp_path}:/bin:/usr/bin" if compiler == "broken" else str(tmp_path)
    printed = run(code, PATH=path, CC="", HASHTAB_CACHE_DIR=str(tmp_path / "cache"))
    warned, raised = printed.splitlines()
    reason = "no C compiler found" if compiler == "missing" else "failed: no such target"
    assert warned.count("native code is not available") == 1
    assert reason in warned
    assert "impl='native' cannot run" in raised
    assert reason in raised


def test_processes_that_start_together_share_one_build(tmp_path: Path) -> None:
    code = ATTEND + "sdim.attend(*arguments, impl='native')"
    environment = os.environ | {"HASHTAB_CACHE_DIR": str(tmp_path / "cache")}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (library,) = (tmp_path / "cache").iterdir()
    assert library.suffix == ".so"


def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    cache = {"HASHTAB_CACHE_DIR": str(tmp_path / "cache")}
    run("sdim.attend(*arguments, impl='native')", **cache)
    (library,) = (tmp_path / "cache").iterdir()
    library.write_bytes(b"")
    run("sdim.attend(*arguments, impl='native')", **cache)
    assert library.stat().st_size > 1000


def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    code = """
try:
    sdim.attend(*arguments, impl="native")
except RuntimeError as error:
    print(error)
"""
    printed = run(code, HASHTAB_CACHE_DIR=str(blocker))
    assert "HASHTAB_CACHE_DIR to a folder that can be written to" in printed


def test_import_needs_torch_alone_and_compiles_nothing(tmp_path: Path) -> None:
    code = """
import sys
for name in ("ray", "mlflow", "polars", "pandas", "sklearn", "pyarrow", "triton"):
    sys.modules[name] = None
"""
    names = ("sdim", "dense", "nsa", "piecewise", "tabmixer")
    use = "".join(f"import hashtab.kernels.{name}\n" for name in names)
    result = subprocess.run(
        [sys.executable, "-c", code + use],
        env=os.environ | {"HASHTAB_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    assert result.returncode == 0
    assert not list(tmp_path.iterdir())
