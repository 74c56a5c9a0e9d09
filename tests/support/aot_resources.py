"""What a compiled kernel needs of its chip, and which matrix instructions its loops run."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"\b(UTC[A-Z]*MMA|HGMMA|HMMA|v_mfma)(?:\b|_)")


@dataclass(frozen=True)
class Resources:
    """Of one variant.

    Args:
        registers: of a thread. spills: registers that the compiler keeps in memory, or bytes of it.
        shared: bytes of shared memory of a program. tensor: columns of tensor memory, 512 at most.
        looped: matrix instructions inside loops, by name. straight: those outside.
    """

    registers: int
    spills: int
    shared: int
    tensor: int
    looped: dict[str, int]
    straight: dict[str, int]


def resources(compiled: Any) -> Resources:
    metadata = compiled.metadata
    if "cubin" in compiled.asm:
        return _nvidia(compiled.asm["cubin"], metadata.shared, getattr(metadata, "tmem_size", 0))
    return _amd(compiled.asm["amdgcn"], metadata.shared)


def _nvidia(cubin: bytes, shared: int, tensor: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", "-hex", file.name)
    use = {name: int(size) for name, size in re.findall(r"(\w+):(\d+)", usage)}
    # A stack without loads and stores of it is an array that was given a place and never spilled.
    moved = len(re.findall(r"\b(?:LDL|STL)\b", code))
    spills = max(use["LOCAL"], moved)
    lines = [line for line in code.splitlines() if line.strip()]
    return Resources(use["REG"], spills, shared, tensor, *_matrix(lines))


def _amd(code: str, shared: int) -> Resources:
    def read(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # type: ignore[index]

    # A scalar register spills to a lane of a vector register, not to memory.
    lines = code.splitlines()
    return Resources(read("vgpr_count"), read("vgpr_spill_count"), shared, 0, *_matrix(lines))


def _matrix(lines: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Matrix instructions inside and outside loops; a loop is what a branch backwards encloses."""
    labels = {
        match[1]: place
        for place, line in enumerate(lines)
        if (match := re.match(r"(\.\w+):", line))
    }
    loops = [
        range(labels[match[1] or match[2]], place)
        for place, line in enumerate(lines)
        if (match := re.search(r"branch\w*\s+\D*?(\.\w+)|BRA\b[^`]*`\((\.\w+)\)", line))
        and labels.get(match[1] or match[2], place) < place
    ]
    counts: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for place, line in enumerate(lines):
        if match := MATRIX.search(line):
            count = counts[0 if any(place in loop for loop in loops) else 1]
            count[match[1]] = count.get(match[1], 0) + 1
    return counts


def _run(tool: str, *arguments: str) -> str:
    run = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return run.stdout
