"""Compiles, with no GPU, what host functions would launch on one, and says what it takes there.

For a process of its own, as Triton decides at its import whether kernels are interpreted:
`python -m tests.kernels.triton_compile 90 attend` shows the cases of `tests.kernels.launches` with
"attend" in their name as they are on sm_90.
"""

import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tests.kernels.machine_code import disassembled, lost_registers, overwritten_factors

if TYPE_CHECKING:
    from hashtab.kernels.core.tuning import Asked
    from tests.kernels.launches import Batch, Shape

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_DOT = re.compile(
    r"= (?P<operation>tt\.dot|ttng\.warp_group_dot) .* : (?:tensor|!ttg\.memdesc)"
    r"<(?:\d+x)+(?P<operand>\w+), .* -> tensor<(?P<rows>\d+)x(?P<columns>\d+)x\w+, #(?P<layout>\w+)"
)


# Looking at machine code takes half a second: it is done where products take many descriptors, and
# at walks, whose loops have branches.
_MANY_GROUPS = re.compile(r" (24|32|64)x\d")
_GPUS = {90: "NVIDIA H200"}  # whose measured launch shapes are compiled, by compute capability


@dataclass(frozen=True)
class Dot:
    """A matrix product of a kernel.

    Attributes:
        unit: what computes it: `wgmma` or `mma`, tensor cores; or `fma`, which are none.
        operand: the type of its first factor.
        rows: of its first factor.
        columns: of its second.
    """

    unit: str
    operand: str
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.operand} on {self.unit}"


@dataclass(frozen=True)
class Compiled:
    """One kernel as a GPU would run it.

    Attributes:
        kernel: the name of its function.
        warps: of a block.
        registers: of a thread.
        stack: bytes of a thread; what registers cannot hold is spilled there.
        local: bytes of a thread beside the stack.
        shared: bytes of a block.
        dots: the kinds of its matrix products.
        lost: its instructions that read what is not there, as far as they were looked at.
    """

    kernel: str
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    dots: list[Dot]
    lost: list[str]

    def __str__(self) -> str:
        memory = (
            f"{self.registers} registers, {self.stack + self.local} spilled, {self.shared} shared"
        )
        lost = f"; {len(self.lost)} read what is not there" if self.lost else ""
        dots = ", ".join(map(str, self.dots))
        return f"{self.kernel}: {self.warps} warps, {memory}; {dots}{lost}"


class _NoDevice:
    """What Triton asks of a driver up to a launch."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # Triton keeps what it compiled by this number

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def _compiling(capability: int) -> Iterator[list[Any]]:
    """Collect Triton's compiled kernels in place of launching them, once each.

    Signature, constants, alignment and options are what Triton itself derives from the arguments
    of a launch, so they may be tensors on "meta": of any size, without memory, and an error where
    host code would wait for their content.
    """
    from triton.runtime.jit import JITFunction

    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        found[compiled.hash] = compiled
        return compiled

    kernels: list[Any] = []
    with mock.patch.object(JITFunction, "run", compile_only), _no_device(capability):
        yield kernels
    kernels.extend(found.values())


@contextmanager
def _no_device(capability: int) -> Iterator[None]:
    """Have host code take a GPU for there whose measured launch shapes are known."""
    from triton.runtime.driver import driver

    from hashtab.kernels.core import dispatch, tuning  # imports Triton, by way of torch

    driver.set_active(_NoDevice(capability))
    found = mock.patch.object(dispatch, "capability", return_value=divmod(capability, 10))
    measured = mock.patch.object(tuning, "gpu_name", return_value=_GPUS.get(capability, ""))
    with found, measured:
        yield


def asked_for(capability: int, shapes: list["Shape"]) -> dict[str, "Asked"]:
    """Return all that SDIM's kernels ask for on behaviours and codes of these shapes, by case.

    Nothing is compiled, so this takes no time.
    """
    from triton.runtime.jit import JITFunction

    from hashtab.kernels.core import dispatch, tuning
    from tests.kernels.launches import SDIM

    found_capability = mock.patch.object(
        dispatch, "capability", return_value=divmod(capability, 10)
    )
    nothing = mock.patch.object(JITFunction, "run", return_value=None)
    unknown = mock.patch.object(tuning, "gpu_name", return_value="")
    with nothing, found_capability, unknown, tuning.asked() as record:
        for shape in shapes:
            for launch in SDIM.values():
                launch(shape)
    return record


def variants(capability: int, case: str, batch: "Batch") -> set[str]:
    """Return what a case would have Triton compile for a batch of this size, told by its keys.

    Nothing is compiled, so this takes no time.
    """
    from triton.runtime.jit import JITFunction

    from tests.kernels.launches import batches_of, launches

    found: set[str] = set()

    def compile_nothing(self: Any, key: str, *_: Any) -> None:
        found.add(f"{self.fn.__name__} {key}")

    run = JITFunction.run

    def look_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        for param, value in zip(self.params, args, strict=False):
            unknown = param.do_not_specialize and hasattr(value, "data_ptr")
            assert not unknown, f"{self.fn.__name__} would load {param.name} number by number"
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    compiler = mock.patch.object(JITFunction, "_do_compile", compile_nothing)
    launcher = mock.patch.object(JITFunction, "run", look_only)
    with compiler, launcher, _no_device(capability), batches_of(batch):
        launches(capability)[case]()
    return found


def use_compiler(cache: str) -> None:
    """Make this process compile, though another interprets, into an empty folder."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache


def compiled_by(capability: int, case: str) -> list[Compiled]:
    """Return what a case would launch on a GPU of this compute capability."""
    from tests.kernels.launches import launches

    with _compiling(capability) as kernels:
        launches(capability)[case]()
    many = _MANY_GROUPS.search(case) is not None
    return [
        _measured_once(kernel, capability >= 90 and (many or "_walk" in kernel.metadata.name))
        for kernel in kernels
    ]


_MEASURED: dict[tuple[str, bool], Compiled] = {}  # by hash; cases share kernels


def _measured_once(kernel: Any, disassemble: bool) -> Compiled:
    key = kernel.hash, disassemble
    if key not in _MEASURED:
        _MEASURED[key] = _measured(kernel, disassemble)
    return _MEASURED[key]


def _measured(kernel: Any, disassemble: bool) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        registers, stack, local = _resources(file.name)
        code = disassembled(Path(file.name)) if disassemble else ""
        lost = lost_registers(code) + overwritten_factors(code) if disassemble else []
    return Compiled(
        kernel=kernel.metadata.name,
        warps=kernel.metadata.num_warps,
        registers=registers,
        stack=stack,
        local=local,
        shared=kernel.metadata.shared,
        dots=_dots(kernel.asm["ttgir"]),
        lost=lost,
    )


def _resources(cubin: str) -> tuple[int, int, int]:
    """Return registers, bytes of stack and bytes of local memory of a thread."""
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (usage,) = _RESOURCES.findall(report)
    registers, stack, local = map(int, usage)
    return registers, stack, local


def _dots(ttgir: str) -> list[Dot]:
    """Return the kinds of matrix products in Triton's GPU code."""
    dots = set()
    found = list(_DOT.finditer(ttgir))
    assert len(found) == len(re.findall(r"= \S+dot ", ttgir)), "a matrix product was not understood"
    for dot in found:
        tensor_cores = "wgmma" if dot["operation"] == "ttng.warp_group_dot" else "mma"
        unit = tensor_cores if dot["layout"].startswith("mma") else "fma"
        dots.add((unit, dot["operand"], int(dot["rows"]), int(dot["columns"])))
    return [Dot(*dot) for dot in sorted(dots)]


def main(capability: int, part: str = "") -> None:
    """Print the kernels of each case, or why they do not compile."""
    from tests.kernels.launches import launches

    for case in launches(capability):
        if part not in case:
            continue
        print(case)
        try:
            for kernel in compiled_by(capability, case):
                print("   ", kernel)
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
