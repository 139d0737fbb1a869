"""The kernels compile for every supported chip: no spills, no oversized tiles, tensor cores in use.

Each chip in a process of its own, without Triton's interpreter and without a GPU. Compiled kernels
stay in Triton's cache, so only what changed since the last run costs time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile import ARCHS
from bench.compile_cases import compile_cases
from bench.strict_json import read_json

ROOT = Path(__file__).resolve().parents[1]


def test_quick_cases_reach_every_entry_of_the_tables() -> None:
    from attnvariants.kernels import _configs

    kinds = {_configs._kind(arch) for arch in ARCHS} | {"float32"}
    for kernel, table in _configs._TABLES.items():
        assert set(table) == kinds
        for kind, entries in table.items():
            dtype = "float32" if kind == "float32" else "bfloat16"
            reached = {
                min(dim for dim in entries if dim >= max(case.case.key_dim, case.case.values))
                for case in compile_cases(quick=True)
                if kernel in case.kernels and case.dtype == dtype
            }
            assert reached == set(entries), (kernel, kind)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_breaks_a_rule(arch: int, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    try:
        assert triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        pytest.skip(f"{error}: set TRITON_CUOBJDUMP_PATH")
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "compile", "--quick", "--archs", str(arch)]
        + ["--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    rows = read_json(tmp_path / "compile.json")["rows"]
    launched = {row["kernel"].removesuffix("_kernel") for row in rows}
    assert launched == {name for case in compile_cases(quick=True) for name in case.kernels}
    broken = [line for line in done.stdout.splitlines() if line.startswith("BROKEN")]
    assert not broken, "\n".join(broken)
    assert done.returncode == 0
