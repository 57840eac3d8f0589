"""What a kernel's machine code tells: how many tensor-core instructions it has, and what else it issues beside each.

nvdisasm (of the package nvidia-cuda-nvdisasm, or on PATH) turns machine code into text; a loop is what a backward
branch spans. The main loop is where the tensor cores work: the innermost loops that hold an mma instruction. Kernels
that unroll everything have one such loop, the one over tokens or tiles, and then `issue_per_mma` is exact; where an
inner loop is not unrolled, what runs between its rounds is not counted, and the figure is a lower bound.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_LABEL = re.compile(r"^(\.\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
_TARGET = re.compile(r"`\((\.\w+)\)")
_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.(\w+),")

FLOAT_MMA = ("HMMA",)
INT_MMA = ("IMMA", "QMMA")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its address, its operation without modifiers, and where it branches to."""

    address: int
    operation: str
    target: int | None


@dataclass(frozen=True)
class Counts:
    """Static counts of a kernel.

    Args:
        hmma, imma: floating-point and integer tensor-core instructions in the code.
        issue_per_mma: instructions for each mma in the main loop, mma included; None for a kernel without mma.
    """

    hmma: int
    imma: int
    issue_per_mma: float | None


def count_instructions(cubin: bytes, entry: str) -> Counts | None:
    """The counts of a kernel, or None where nvdisasm is not installed."""
    tool = find_nvdisasm()
    if tool is None:
        return None
    return counts(parse(disassemble(cubin, tool), entry))


@lru_cache(maxsize=1)
def find_nvdisasm() -> Path | None:
    """nvdisasm from the NVIDIA packages of this Python, or from PATH."""
    for entry in sys.path:
        for tool in sorted(Path(entry or ".").glob("nvidia/*/bin/nvdisasm")):
            return tool
    found = shutil.which("nvdisasm")
    return None if found is None else Path(found)


def disassemble(cubin: bytes, tool: Path) -> str:
    """The text of nvdisasm; empty where it fails, which a caller sees as a kernel without instructions."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [str(tool), "-c", "-ndf", str(file)], capture_output=True, encoding="utf-8", check=False
            )
            return done.stdout
    return ""


def parse(text: str, entry: str) -> list[Instruction]:
    """The instructions of one function of nvdisasm's text."""
    found: list[tuple[int, str, str | None]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    inside = False
    for line in text.splitlines():
        section = _FUNCTION.match(line)
        inside = section[1] == entry if section else inside
        if not inside:
            continue
        label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            waiting.append(label[1])
        elif instruction:
            address = int(instruction[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            target = _TARGET.search(instruction[3]) if instruction[2].startswith("BRA") else None
            found.append((address, instruction[2].partition(".")[0], target[1] if target else None))
    return [Instruction(address, name, labels.get(target or "")) for address, name, target in found]


def counts(instructions: list[Instruction]) -> Counts | None:
    """Counts of a function, or None where there is none."""
    if not instructions:
        return None
    hmma = sum(one.operation in FLOAT_MMA for one in instructions)
    imma = sum(one.operation in INT_MMA for one in instructions)
    loops = main_loops(instructions) or [instructions]
    issued, mma = sum(map(len, loops)), sum(_mma(loop) for loop in loops)
    return Counts(hmma, imma, issued / mma if mma else None)


def main_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that hold an mma instruction, in order."""
    spans = {(one.target, one.address) for one in instructions if one.target is not None and one.target <= one.address}
    # Branches back to one place (`continue`) end one loop, not several.
    ends: dict[int, int] = {}
    for start, end in spans:
        ends[start] = max(end, ends.get(start, end))
    loops = [[one for one in instructions if start <= one.address <= end] for start, end in sorted(ends.items())]
    loops = [loop for loop in loops if _mma(loop)]
    return [loop for loop in loops if not any(_inside(other, loop) for other in loops)]


def _mma(instructions: list[Instruction]) -> int:
    return sum(one.operation in FLOAT_MMA + INT_MMA for one in instructions)


def _inside(inner: list[Instruction], outer: list[Instruction]) -> bool:
    return inner is not outer and outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address
