"""What only the machine code of a kernel shows, read from its disassembly.

ptxas (CUDA 12.8) makes descriptors of matrix products from uniform registers that it never wrote,
where two tiles lie at one place of shared memory and their products need many. Such a kernel reads
memory that is not its own, or multiplies another tile.
"""

import re
import subprocess
from pathlib import Path

_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<operation>[A-Z][\w.]*)\s*(?P<operands>.*?) ;"
)
_UNIFORM = re.compile(r"(?P<descriptor>g?desc\[)?\bUR(?P<number>\d+)")
_WRITES_UNIFORM = ("U", "R2UR", "S2UR", "REDUX", "VOTEU")


def disassembled(cubin: Path) -> str:
    """Return a kernel's instructions, one a line behind its address."""
    import triton

    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def lost_registers(code: str) -> list[str]:
    """Return the instructions that read a uniform register which none above them writes."""
    instructions = _INSTRUCTION.findall(code)
    assert any(operation == "EXIT" for operation, _ in instructions), "code was not understood"
    written: set[int] = set()
    found = []
    for operation, operands in instructions:
        target, _, sources = operands.partition(",")
        writes = operation.startswith(_WRITES_UNIFORM) and target.startswith("UR")
        if _read(sources if writes else operands) - written:
            found.append(f"{operation} {operands}")
        if writes:
            first, wide = int(target.removeprefix("UR")), re.search(r"\.64|WIDE", operation)
            written.update({first, first + 1} if wide else {first})
    return found


def _read(operands: str) -> set[int]:
    """Return the uniform registers that operands name, and those that follow in a descriptor."""
    found: set[int] = set()
    for descriptor, number in _UNIFORM.findall(operands):
        first = int(number)
        if descriptor == "gdesc[":  # two for each factor, of which the first may lie elsewhere
            unused = 2 if re.match(r"R\d+, R\d+", operands) else 0
            found.update(range(first + unused, first + 4))
        else:
            found.update({first, first + 1} if descriptor else {first})
    return found
