"""Compiles kernels for any GPU without one, by running the code that would launch them.

A launcher chooses tile sizes, strides and flags; only its own call compiles what production will
run. So the launchers are called on CPU tensors, with a driver that names the wanted chip, and
every launch stops after compilation.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.errors import BenchError

_TILE = re.compile(r"B[A-Z0-9]+$")  # tile sizes, by the letters of kernels/README
_TILE_ORDER = ("BT", "BS", "BK", "BV")  # and then the others


@dataclass(frozen=True)
class Compiled:
    """One launch: the kernel with its tiles and options, and what the compiler made of it."""

    kernel: str
    arch: int
    tiles: dict[str, int]
    warps: int
    stages: int
    seconds: float
    key: str = ""  # equal for equal binaries
    shared: int = 0  # bytes of shared memory
    tensor_memory: int = 0  # columns
    cached: bool = False  # not compiled now: from Triton's cache
    cubin: bytes = field(default=b"", repr=False)
    error: str = ""  # why there is no binary


def refuse_interpreter() -> None:
    """Triton's interpreter replaces the compiler for the whole process.

    Raises:
        BenchError: it was asked for.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise BenchError("nothing is compiled while TRITON_INTERPRET is set; unset it")


class _Driver:
    """The part of a Triton driver that compilation needs; every chip is a device of its own."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[list[Compiled]]:
    """Inside, launches compile for compute capability ``arch`` and do not run.

    Yields the list to which every launch adds itself. Tensors stay as they are: what a kernel
    would have written is not there.
    """
    refuse_interpreter()
    import triton
    from triton.runtime.jit import JITFunction

    found: list[Compiled] = []
    original, listener = JITFunction.run, triton.knobs.compilation.listener
    fresh = False

    def listen(*, cache_hit: bool, **_: Any) -> None:
        nonlocal fresh
        fresh = not cache_hit

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        nonlocal fresh
        fresh = False
        start = time.perf_counter()
        kernel, error = None, ""
        try:
            kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as failure:  # the launches behind this one are compiled all the same
            error = _reason(failure)
        seconds = time.perf_counter() - start
        constants = self.signature.bind_partial(
            *args, **{name: value for name, value in kwargs.items() if name in self.arg_names}
        ).arguments
        found.append(_record(self, arch, constants, kwargs, kernel, error, seconds, not fresh))
        return kernel

    JITFunction.run = run
    triton.knobs.compilation.listener = listen
    triton.runtime.driver.set_active(_Driver(arch))
    try:
        yield found
    finally:
        triton.runtime.driver.set_active(None)  # the next launch looks for the real one
        triton.knobs.compilation.listener = listener
        JITFunction.run = original


def _record(
    function: Any,
    arch: int,
    arguments: dict[str, Any],
    options: dict[str, Any],
    kernel: Any,
    error: str,
    seconds: float,
    cached: bool,
) -> Compiled:
    constant = {parameter.name for parameter in function.params if parameter.is_constexpr}
    common: dict[str, Any] = {
        "kernel": function.__name__,
        "arch": arch,
        "tiles": _tiles({name: value for name, value in arguments.items() if name in constant}),
        "seconds": seconds,
    }
    if kernel is None:
        warps, stages = (int(options.get(name, 0)) for name in ("num_warps", "num_stages"))
        return Compiled(**common, warps=warps, stages=stages, error=error or "nothing came out")
    return Compiled(
        **common,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        key=kernel.hash,
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        cached=cached,
        cubin=kernel.asm["cubin"],
    )


def _tiles(constants: dict[str, Any]) -> dict[str, int]:
    """The tile sizes among compile-time arguments, which may be named tuples of them."""
    found: dict[str, int] = {}
    for name, value in constants.items():
        if hasattr(value, "_asdict"):
            found |= _tiles(value._asdict())
        elif _TILE.match(name) and isinstance(value, int) and value > 0:
            found[name] = value
    order = [*_TILE_ORDER, *found]
    return {name: found[name] for name in dict.fromkeys(order) if name in found}


def _reason(error: Exception) -> str:
    """The line of a compiler's message that says what is wrong: an error, or else the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = next((line for line in lines if "error" in line.lower()), lines[-1])
    return f"{type(error).__name__}: {said[:200]}"
