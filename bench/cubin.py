"""What a compiled kernel needs, read from its cubin: registers, stack, tensor-core instructions.

``cuobjdump`` does the reading; Triton's wheel brings one, so no CUDA toolkit and no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field

from bench.errors import BenchError

# Shared memory that one block can have, in bytes, by compute capability. The compiler does not
# check it: a kernel that asks for more fails when it is launched.
SHARED_LIMIT = {
    80: 166_912,
    86: 101_376,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    120: 101_376,
}
TENSOR_MEMORY_LIMIT = 512  # columns, on the chips that have any

_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)")
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE
)
# Of a warp (HMMA and the like), of a warp group (HGMMA), of a block on Blackwell (UTCHMMA).
_TENSOR_CORE = re.compile(r"(UTC[A-Z]*MMA|[HIQB]GMMA|[HIBDQO]MMA)$")
_SPILLS = ("STL", "LDL")


@dataclass(frozen=True)
class Resources:
    """What the machine code of a kernel uses. ``stack`` is in bytes per thread: spilled values."""

    registers: int
    stack: int
    instructions: int  # without padding
    spills: int  # loads and stores of the stack
    tensor_cores: dict[str, int] = field(default_factory=dict)  # instructions by kind


def inspect(cubin: bytes) -> Resources:
    """Reads a cubin.

    Raises:
        BenchError: there is no ``cuobjdump``, or it does not understand the file.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        registers, stack = parse_usage(_cuobjdump("-res-usage", file.name))
        instructions = parse_sass(_cuobjdump("-sass", file.name))
    return Resources(
        registers=registers,
        stack=stack,
        instructions=sum(instructions.values()),
        spills=sum(instructions[name] for name in _SPILLS),
        tensor_cores={
            name: count for name, count in sorted(instructions.items()) if _TENSOR_CORE.match(name)
        },
    )


def parse_usage(text: str) -> tuple[int, int]:
    """Registers and stack bytes from ``cuobjdump -res-usage``: the most of any function."""
    found = [(int(registers), int(stack)) for registers, stack in _USAGE.findall(text)]
    if not found:
        raise BenchError(f"cuobjdump tells no resource usage: {text.strip()[:200]!r}")
    return max(registers for registers, _ in found), max(stack for _, stack in found)


def parse_sass(text: str) -> Counter[str]:
    """Instructions by name from ``cuobjdump -sass``; modifiers and padding are left out."""
    found = Counter(_INSTRUCTION.findall(text))
    del found["NOP"]
    if not found:
        raise BenchError(f"cuobjdump lists no instructions: {text.strip()[:200]!r}")
    return found


def _cuobjdump(*arguments: str) -> str:
    try:
        done = subprocess.run(
            [tool(), *arguments], capture_output=True, text=True, timeout=300, check=True
        )
    except subprocess.CalledProcessError as error:
        why = (error.stderr or error.stdout).strip().splitlines()[:1] or ["no message"]
        raise BenchError(f"cuobjdump fails with exit code {error.returncode}: {why[0]}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise BenchError(f"cuobjdump does not run: {error}") from error
    return done.stdout


def tool() -> str:
    """Path of the ``cuobjdump`` that Triton uses: its own, or ``TRITON_CUOBJDUMP_PATH``."""
    import triton

    try:
        return str(triton.knobs.nvidia.cuobjdump.path)
    except (AttributeError, RuntimeError) as error:
        raise BenchError(
            "Triton brings no cuobjdump here; set TRITON_CUOBJDUMP_PATH to that of a CUDA toolkit"
        ) from error
