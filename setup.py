"""Builds the optional CUDA extension; everything else is declared in pyproject.toml.

``ATTNVARIANTS_CUDA=auto`` (the default) compiles ``csrc/`` where the build environment has a CUDA
build of torch and a CUDA toolkit, ``0`` never does, ``1`` fails where it cannot.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from setuptools import setup

TORCH_TARGET = "0x020a000000000000"  # stable ABI of torch 2.10: one binary serves later versions
PYTHON_TARGET = "0x030A0000"  # limited API of Python 3.10, likewise
OLDEST = (8, 0)  # compute capability that csrc/ compiles for


def obstacle() -> str:
    """Why the extension cannot be built in this environment; empty where it can."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError:
        return (
            "torch cannot be imported while building; install it first and use "
            "pip install --no-build-isolation"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if CUDA_HOME is None:
        return "no CUDA toolkit found; put nvcc on PATH or set CUDA_HOME"
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # torch builds for the GPUs that it sees
        wish = "say for which to build, as in TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'"
        gpus = range(torch.cuda.device_count())
        capabilities = [torch.cuda.get_device_capability(gpu) for gpu in gpus]
        if not capabilities:
            return f"no GPU is visible; {wish}"
        if min(capabilities) < OLDEST:
            return f"a visible GPU is older than compute capability 8.0; {wish}"
    return ""


def extension_arguments() -> dict[str, Any]:
    choice = os.environ.get("ATTNVARIANTS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"ATTNVARIANTS_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return {}
    reason = obstacle()
    if reason:
        if choice == "1":
            raise SystemExit(f"ATTNVARIANTS_CUDA=1, but the extension cannot be built: {reason}")
        print(f"attnvariants: building without the CUDA extension ({reason})")
        return {}

    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DPy_LIMITED_API={PYTHON_TARGET}"]
    extension = CUDAExtension(
        "attnvariants._C",
        sources=sorted(str(path) for path in Path("csrc").glob("*.c*") if path.suffix != ".cuh"),
        extra_compile_args={
            "cxx": ["-O3", "-DUSE_CUDA", *flags],
            "nvcc": ["-O3", "-lineinfo", "-DUSE_CUDA", *flags],
        },
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension_arguments())
