"""Plain C compiled with the system's compiler at first use, kept in a cache, called by ctypes."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

HEADERS = Path(__file__).parent  # what C files of several operators include lies here
FLAGS = ("-O3", "-march=native", "-std=c11", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
SUFFIX = {torch.float32: "float", torch.float64: "double"}  # of functions made for both
CACHE_VARIABLE = "HASHTAB_CACHE_DIR"


class NativeUnavailableError(RuntimeError):
    """Native code cannot be built or loaded on this machine; the message says why."""


def cache_folder() -> Path:
    """Return the folder of compiled code: $HASHTAB_CACHE_DIR, else the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hashtab"


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """Compile a C file unless the cache has it, and load it.

    Args:
        source: the C file; what it includes must be itself, the system's, or lie in this folder.

    Returns:
        The library; its calls release the GIL.

    Raises:
        NativeUnavailableError: no compiler, a failed build, or a cache that cannot be written.
    """
    try:
        compiler = _compiler()
        library = cache_folder() / f"{source.parent.name}-{_digest(source, compiler)}.so"
        if library.exists():
            with suppress(OSError):  # a damaged file is built again
                return ctypes.CDLL(str(library))
        _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except NativeUnavailableError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise NativeUnavailableError(
            f"code cannot be compiled, kept or loaded: {error}; set CC to a compiler, and "
            f"{CACHE_VARIABLE} to a folder that can be written to and executed from"
        ) from error


@functools.cache
def why_not(source: Path) -> str | None:
    """Return why the C file cannot be used here, or None when it can. Tried once a process."""
    try:
        load(source)
    except NativeUnavailableError as error:
        return str(error)
    return None


def call(source: Path, function: str, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Call a C function `int f(tensors ..., int64_t sizes ..., int threads)`.

    Args:
        source: the C file.
        function: its name.
        tensors: CPU tensors, passed by address; the last is the result and must be contiguous,
            of the others a contiguous copy is made where needed.
        sizes: whole numbers.

    Raises:
        MemoryError: the function could not allocate its working memory.
    """
    inputs = [tensor.contiguous() for tensor in tensors[:-1]]
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*inputs, tensors[-1])]
    numbers = [ctypes.c_int64(size) for size in sizes]
    threads = ctypes.c_int(torch.get_num_threads())
    if load(source)[function](*addresses, *numbers, threads) != 0:
        raise MemoryError(f"{function}: no memory for the working space of sizes {list(sizes)}")


def _compiler() -> str:
    candidates = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    for candidate in candidates:
        if candidate and (path := shutil.which(candidate)):
            return path
    raise NativeUnavailableError("no C compiler found: install gcc, or set CC to a compiler's path")


def _digest(source: Path, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    headers = (header.read_bytes() for header in sorted(HEADERS.glob("*.h")))
    parts = (source.read_bytes(), *headers, " ".join(FLAGS).encode(), version, _cpu().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _cpu() -> str:
    """Name the CPU and its features: a cache on a shared disk serves several kinds of machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(told))])


def _compile(compiler: str, source: Path, library: Path) -> None:
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        built = Path(folder) / library.name
        command = [compiler, *FLAGS, f"-I{HEADERS}", str(source), "-o", str(built), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise NativeUnavailableError(
                f"`{' '.join(command)}` failed: {result.stderr.strip()[-500:]}"
            )
        with built.open("rb") as file:
            os.fsync(file.fileno())  # half a library would end the process that loads it
        built.replace(library)
