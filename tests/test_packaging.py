"""What an installation contains, and how the optional extension is chosen and built."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _copy_of_sources(folder: Path) -> Path:
    for name in ("attnvariants", "kernels", "csrc"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def _setup(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_wheel_holds_every_part_and_nothing_else(tmp_path: Path) -> None:
    source = _copy_of_sources(tmp_path)
    (source / "kernels" / "probe.py").write_text("value = 1\n")  # stands for any kernel file
    done = _setup(source, "bdist_wheel", ATTNVARIANTS_CUDA="0")
    assert done.returncode == 0, done.stderr
    wheel = next((source / "dist").glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"attnvariants"}
    assert "attnvariants/kernels/probe.py" in names
    assert "attnvariants/kernels/__init__.py" not in names  # the stand-in is for checkouts only
    assert "attnvariants/py.typed" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "attnvariants").rglob("*.py")}
    assert modules - {"attnvariants/kernels/__init__.py"} <= set(names)


def test_unknown_choice_is_refused(tmp_path: Path) -> None:
    done = _setup(_copy_of_sources(tmp_path), "--version", ATTNVARIANTS_CUDA="yes")
    assert done.returncode != 0
    assert "must be auto, 0 or 1, got 'yes'" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can build the extension")
def test_demanding_the_extension_without_cuda_fails_loudly(tmp_path: Path) -> None:
    done = _setup(_copy_of_sources(tmp_path), "--version", ATTNVARIANTS_CUDA="1")
    assert done.returncode != 0
    assert "build without CUDA" in done.stderr


@pytest.mark.parametrize(
    ("gpus", "archs", "message"),
    [
        ([], "", "no GPU is visible"),
        ([(9, 0), (7, 5)], "", "older than compute capability 8.0"),
        ([(9, 0), (8, 6)], "", ""),
        ([], "9.0", ""),
    ],
)
def test_gpus_to_build_for(
    gpus: list[tuple[int, int]], archs: str, message: str, tmp_path: Path
) -> None:
    """Torch gives up where it sees no GPU, and old ones lack what csrc/ is written in."""
    code = (
        "import runpy, sys, torch, torch.utils.cpp_extension as extension; "
        "torch.version.cuda, extension.CUDA_HOME = '13.0', '/cuda'; "
        f"torch.cuda.device_count = lambda: {len(gpus)}; "
        f"torch.cuda.get_device_capability = {gpus}.__getitem__; "
        "sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=_copy_of_sources(tmp_path),
        env={**os.environ, "ATTNVARIANTS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": archs},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == bool(message), done.stderr
    assert message in done.stderr


def test_extension_module_compiles_and_says_what_it_is(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    include = sysconfig.get_path("include")
    if compiler is None or not (Path(include) / "Python.h").is_file():
        pytest.skip("needs g++ and the Python headers")
    library = tmp_path / "_C.abi3.so"
    flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-std=c++17", "-Wall", "-Werror", *flags, f"-I{include}"]
        + [str(ROOT / "csrc" / "registration.cpp"), "-o", str(library)],
        check=True,
    )
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build_info() == {"cuda": 0, "torch_major": 2, "torch_minor": 10}


def test_versions_agree() -> None:
    import attnvariants

    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{attnvariants.__version__}"' in text
    assert f"## {attnvariants.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_direct_dependency() -> None:
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = {"torch", "triton", "einops", "numpy", "rich", "matplotlib", "pytest", "hypothesis"}
    assert wanted <= pinned
