"""csrc/ compiles for every supported chip: no warnings, no spills. Nothing is run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from cuda_build import CSRC, STABLE, TORCH, WARNINGS

NVCC = shutil.which("nvcc")
ARCHS = ("80", "86", "90a", "100a", "120a")
# -arch=sm_90a would also compile for the plain compute_90: name every pair.
TARGETS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
KERNEL = re.compile(
    r"\d(?P<name>[a-z_]+)_kernel(?:I(?P<dtype>f|6__half|13__nv_bfloat16)(?:Li(?P<size>\d+)E)?)?"
)
DTYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16", None: "any"}

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc on PATH")


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("softmax_decode", 3 * 3),  # dtypes and sizes
        ("linear_decode", 3 * 3),
        ("softmax_forward", 3 * 5),
        ("linear_forward", 3 * 3 + 3 + 1),  # the norm and the scan come in one size
    ],
)
def test_kernels_compile_without_spills(name: str, kernels: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(NVCC), "-O3", "-std=c++17", *TARGETS, "-Xptxas", "-v", "-Werror", "all-warnings", "-c"]
        + [str(CSRC / f"{name}.cu"), "-o", str(tmp_path / "kernels.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    entries = (done.stdout + done.stderr).split("ptxas info    : Compiling")[1:]
    rows = []
    for entry in entries:
        report = REPORT.search("Compiling" + entry)
        assert report is not None, entry
        kernel = KERNEL.search(report["name"])
        assert kernel is not None, report["name"]
        label = (kernel["name"], report["arch"], DTYPES[kernel["dtype"]], int(kernel["size"] or 0))
        numbers = ("registers", "shared", "stores", "loads", "stack")
        rows.append((*label, *(int(report[key] or 0) for key in numbers)))
    rows.sort()
    print("\nkernel, chip, dtype, size, registers, shared bytes, spill stores, loads, stack")
    for row in rows:
        print(f"{row[0]:>15}", *(f"{cell!s:>9}" for cell in row[1:]))
    assert len(rows) == len(ARCHS) * kernels
    assert not [row for row in rows if any(row[-3:])]


@pytest.mark.parametrize("path", sorted(CSRC.glob("*.cpp")), ids=lambda path: path.stem)
def test_bindings_compile_with_the_headers_of_the_toolkit(path: Path, tmp_path: Path) -> None:
    folders = [TORCH / "include", Path(sysconfig.get_path("include"))]
    systems = [flag for folder in folders for flag in ("-isystem", str(folder))]
    strict = [flag for warning in WARNINGS for flag in ("-Xcompiler", warning)]
    done = subprocess.run(
        [str(NVCC), "-std=c++17", *strict, *STABLE, *systems]
        + ["-c", str(path), "-o", str(tmp_path / "binding.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
