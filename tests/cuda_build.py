"""Builds csrc/ without a GPU: for the CPU with g++, see tests/cuda_on_cpu, or with nvcc."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from attnvariants import _select

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
EMULATION = ROOT / "tests" / "cuda_on_cpu"
TORCH = Path(torch.__file__).parent
STABLE = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
WARNINGS = ["-Wall", "-Werror", "-Wno-unknown-pragmas"]  # g++ does not know #pragma unroll


def compile_for_cpu(sources: Sequence[Path], target: Path, *flags: str) -> None:
    """Compiles CUDA C++ with g++; its threads are fibers."""
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-pthread", "-U_FORTIFY_SOURCE", *WARNINGS]
    command += [f"-I{EMULATION}", *flags, "-x", "c++", *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def why_not_for_cpu() -> str:
    """Why the extension cannot be built for the CPU here; empty where it can."""
    if shutil.which("g++") is None:
        return "needs g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "needs the Python headers"
    if not (TORCH / "include" / "torch" / "csrc" / "stable").is_dir():
        return "needs the headers of torch"
    return ""


def build_extension(csrc: Path = CSRC) -> Path:
    """All of ``csrc/`` as the module ``_C``, with its operators registered for CPU tensors."""
    folder = Path(tempfile.mkdtemp())
    sources = sorted(x for x in csrc.iterdir() if x.suffix in (".cu", ".cpp"))
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}"]
    flags = [
        *("-shared", "-DATTNVARIANTS_DEVICE=CPU", *STABLE, "-isystem", str(TORCH / "include")),
        *(f"-I{sysconfig.get_path('include')}", *libraries),
    ]
    objects = []
    for source in [*sources, EMULATION / "controls.cpp"]:
        objects.append(folder / f"{source.stem}{source.suffix}.o")
        compile_for_cpu([source], objects[-1], "-c", *flags)
    library = folder / "_C.abi3.so"
    linked = subprocess.run(
        ["g++", "-shared", *map(str, objects), *libraries, "-ltorch", "-ltorch_cpu", "-lc10"]
        + ["-o", str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert linked.returncode == 0, linked.stderr
    return library


@functools.cache
def load_extension() -> tuple[ModuleType, ctypes.CDLL]:
    """The module, built once per process, and what controls the order of its threads."""
    reason = why_not_for_cpu()
    if reason:
        pytest.skip(reason)
    library = build_extension()
    spec = importlib.util.spec_from_file_location("attnvariants._C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("attnvariants._C", None)  # Python enters it by itself; other tests have none
    return module, ctypes.CDLL(str(library))


@contextlib.contextmanager
def cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """Serves ``impl="cuda"`` for CPU tensors; threads and blocks run in a random order."""
    module, library = load_extension()
    monkeypatch.setitem(sys.modules, "attnvariants._C", module)
    monkeypatch.setattr(_select, "_obstacle", lambda *_: "")
    library.cuda_on_cpu_order(1)
    library.cuda_on_cpu_processors(6)
    yield library
    library.cuda_on_cpu_order(0)
    library.cuda_on_cpu_shared_memory(227 * 1024)
