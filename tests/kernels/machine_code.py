"""What only the machine code of a kernel shows, read from its disassembly: two faults of ptxas.

ptxas (CUDA 12.8) makes descriptors of matrix products from uniform registers that it never wrote,
where two tiles lie at one place of shared memory and their products need many. And it overwrites
what a loop's product takes from registers that were loaded before the loop, where a branch of the
loop needs these. Such kernels multiply what is not theirs.
"""

import re
import subprocess
from pathlib import Path

_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<operation>[A-Z][\w.]*)\s*(?P<operands>.*?) ;"
)
_LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)
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


def overwritten_factors(code: str) -> list[str]:
    """Return the products of loops whose first factor is there in a loop's first round alone.

    A loop writes its registers behind the product, and not again before it.
    """
    instructions = [
        (found.start(), found["operation"], found["operands"])
        for found in _INSTRUCTION.finditer(code)
    ]
    starts = {label[1]: label.start() for label in _LABEL.finditer(code)}
    overwritten = []
    for at, operation, operands in instructions:
        label = re.search(r"\.L_x_\d+", operands) if operation == "BRA" else None
        if label and starts[label[0]] < at:
            loop = [rest for start, *rest in instructions if starts[label[0]] < start < at]
            overwritten += _overwritten_in(loop)
    return overwritten


def _overwritten_in(loop: list[list[str]]) -> list[str]:
    written = [_written(operation, operands) for operation, operands in loop]
    found = []
    for number, (operation, operands) in enumerate(loop):
        factor = re.match(r"R\d+, R(\d+)", operands) if operation.startswith("HGMMA") else None
        if factor:
            first = int(factor[1])
            kept = set(range(first, first + 4)) - set().union(*written[:number])
            if kept & set().union(*written[number:]):
                found.append(f"{operation} {operands}")
    return found


def _written(operation: str, operands: str) -> set[int]:
    """Return the registers that an instruction writes."""
    target = re.match(r"R(\d+)\b", operands)
    if not target or operation.startswith("ST"):
        return set()
    size = 1
    if product := re.match(r"HGMMA\.64x(\d+)x\d+\.F(16|32)", operation):
        size = int(product[1]) * int(product[2]) // 64
    elif re.search(r"\.128|88\.4", operation):
        size = 4
    elif re.search(r"\.64|WIDE", operation):
        size = 2
    return set(range(int(target[1]), int(target[1]) + size))
