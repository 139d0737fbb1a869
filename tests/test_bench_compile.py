"""``python -m bench compile`` catches every kernel that breaks a rule, and names it."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import compile as bench_compile
from bench import cubin
from bench.accepted_spills import AcceptedSpill
from bench.ahead_of_time import Compiled
from bench.cases import Case
from bench.compile import Row, merge, problems
from bench.compile_cases import CompileCase, compile_cases
from bench.cubin import Resources
from bench.errors import BenchError

ROOT = Path(__file__).resolve().parents[1]

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function helper:
  REG:40 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function kernel:
  REG:172 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	code for sm_90a
		Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */
                                                              /* 0x000fe20000000800 */
        /*0010*/              @!P0 STL.64 [R1+0x8], R4 ;      /* 0x0000000000447919 */
        /*0020*/              @UP1 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;  /* 0x00 */
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;  /* 0x00 */
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;  /* 0x00 */
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;  /* 0x00 */
        /*0060*/                   FFMA R0, R1, R2, R3 ;      /* 0x0000000000007918 */
       /*12340*/                   LDL R4, [R1+0x8] ;         /* 0x0000000000007918 */
       /*12350*/                   NOP ;                      /* 0x0000000000007918 */
"""


# --- reading -------------------------------------------------------------------------------------


def test_usage_is_the_most_of_any_function() -> None:
    assert cubin.parse_usage(USAGE) == (172, 24)
    with pytest.raises(BenchError, match="no resource usage: 'nothing'"):
        cubin.parse_usage("nothing")


def test_instructions_are_counted_by_name() -> None:
    assert cubin.parse_sass(SASS) == {
        **dict.fromkeys(("LDC", "STL", "UTCHMMA", "HGMMA", "FFMA", "LDL"), 1),
        "HMMA": 2,
    }
    with pytest.raises(BenchError, match="no instructions"):
        cubin.parse_sass("code for sm_90a")


def test_a_cubin_becomes_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"-res-usage": USAGE, "-sass": SASS}
    monkeypatch.setattr(cubin, "_cuobjdump", lambda option, path: texts[option])
    assert cubin.inspect(b"") == Resources(
        registers=172,
        stack=24,
        instructions=8,
        spills=2,
        tensor_cores={"HGMMA": 1, "HMMA": 2, "UTCHMMA": 1},
    )


@pytest.mark.parametrize(
    ("tool", "message"),
    [("/no/such/cuobjdump", "does not run"), ("/bin/false", "fails with exit code 1: no message")],
)
def test_a_tool_that_fails(tool: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubin, "tool", lambda: tool)
    with pytest.raises(BenchError, match=message):
        cubin.inspect(b"")


# --- judging -------------------------------------------------------------------------------------

GOOD = Resources(registers=128, stack=0, instructions=100, spills=0, tensor_cores={"HMMA": 8})


def _compiled(arch: int = 90, **values: Any) -> Compiled:
    return Compiled("kernel", arch, {"BT": 64}, 4, 2, 1.0, **values)


@pytest.mark.parametrize(
    ("arch", "limit"),
    [(80, 166912), (86, 101376), (89, 101376), (90, 232448), (100, 232448), (120, 101376)],
)
def test_shared_memory_has_a_limit(arch: int, limit: int) -> None:
    assert not problems(_compiled(arch, shared=limit), GOOD, tensor_cores=True)
    (found,) = problems(_compiled(arch, shared=limit + 1), GOOD, tensor_cores=True)
    assert f"{limit + 1:,}" in found
    assert f"{limit:,}" in found


def test_other_rules() -> None:
    spilling = Resources(registers=255, stack=40, instructions=100, spills=7)
    assert problems(_compiled(), spilling, tensor_cores=True) == (
        "spills 40 bytes per thread (7 instructions)",
        "no tensor-core instructions",
    )
    assert not problems(_compiled(), spilling, tensor_cores=False, stack=40)
    (found,) = problems(_compiled(), spilling, tensor_cores=False, stack=39)
    assert "accepted are 39" in found
    (found,) = problems(_compiled(tensor_memory=513), GOOD, tensor_cores=True)
    assert found == "513 columns of tensor memory, there are 512"


def test_tensor_cores_are_a_property_of_the_case() -> None:
    def case(dtype: str) -> CompileCase:
        return CompileCase(Case("gated_sdpa", "some"), dtype, lambda case, x: {}, {}, ("row_sums",))

    assert case("bfloat16").needs_tensor_cores("kernel")
    assert case("float16").needs_tensor_cores("kernel")
    assert not case("bfloat16").needs_tensor_cores("row_sums_kernel")
    assert not case("float32").needs_tensor_cores("kernel")


def test_an_accepted_spill_covers_its_own_kernel_only() -> None:
    case = CompileCase(Case("gated_sdpa", "K=256 windowed"), "bfloat16", lambda case, x: {}, {})
    entry = AcceptedSpill("kernel", (80,), 40, "no smaller tile is faster", case="K=256")
    assert entry.covers("kernel", 80, case)
    assert not entry.covers("kernel", 90, case)
    assert not entry.covers("kernel_2", 80, case)
    other = CompileCase(Case("gated_sdpa", "K=128"), "bfloat16", lambda case, x: {}, {})
    assert not entry.covers("kernel", 80, other)


def test_equal_binaries_are_one_row_with_the_strictest_verdict() -> None:
    def row(case: str, key: str, **values: Any) -> Row:
        return Row("kernel", case, "bfloat16", 90, key=key, **values)

    first, second = merge(
        [
            row("a", "1", seconds=2.0),
            row("b", "2"),
            row("c", "1", cached=True, problems=("no tensor-core instructions",)),
        ]
    )
    assert (first.case, first.also, first.seconds, first.cached) == ("a", ("c",), 2.0, False)
    assert first.problems == ("no tensor-core instructions",)
    assert (second.case, second.also, second.problems) == ("b", (), ())


# --- compiling -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], dict[str, Any]]:
    """What the toys give, by case, dtype and chip."""
    pytest.importorskip("triton")
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compile_toys.py"), "80", "90"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {(row["case"], row["dtype"], row["arch"]): row for row in found}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("spills", r"spills \d+ bytes per thread \(\d+ instructions\)"),
        ("too much shared memory", r"\d+,\d+ bytes of shared memory, there are \d+,\d+"),
        ("no dot", r"no tensor-core instructions"),
        ("broken", r"does not compile: CompilationError: Expected pointer argument to have .*"),
        ("launcher raises", r"does not compile: IndexError: list index out of range"),
        ("crash", r"does not compile: the worker process was killed by SIGABRT"),
    ],
)
def test_a_broken_rule_is_caught(case: str, problem: str, arch: int, rows: dict[Any, Any]) -> None:
    (found,) = rows[case, "bfloat16", arch]["problems"]
    assert re.fullmatch(problem, found)


@pytest.mark.parametrize(("arch", "kind"), [(80, "HMMA"), (90, "HGMMA")])
def test_a_good_kernel_passes(arch: int, kind: str, rows: dict[Any, Any]) -> None:
    row = rows["good", "bfloat16", arch]
    assert row["problems"] == []
    assert list(row["tensor_cores"]) == [kind]
    assert row["tiles"] == {"BT": 64, "BS": 64, "BK": 64}
    assert (row["kernel"], row["warps"], row["stages"]) == ("toy_product", 4, 2)
    assert 32 <= row["registers"] < 255
    assert row["shared"] >= 16384
    assert row["seconds"] > 0
    assert not row["cached"]
    assert row["also"] == ["other length"]  # a number that is not specialised: one binary
    exact = rows["good", "float32", arch]
    assert (exact["problems"], exact["tensor_cores"]) == ([], {})


# --- the command ---------------------------------------------------------------------------------


def _arguments(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_compile.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_interpreter_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "compile"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "bench: nothing is compiled while TRITON_INTERPRET is set; unset it\n"


@pytest.mark.parametrize("broken", [False, True])
def test_results_and_exit_code(
    broken: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = Row(
        "kernel",
        "K=64",
        "bfloat16",
        90,
        {"BT": 64, "BS": 32},
        4,
        2,
        problems=("spills 8 bytes per thread (2 instructions)",) if broken else (),
    )
    case = CompileCase(
        Case("gated_sdpa", "K=64"), "bfloat16", lambda case, x: {}, {"kernel": "call"}
    )
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(bench_compile, "compile_cases", lambda quick: [case])
    monkeypatch.setattr(bench_compile, "compile_all", lambda *_, **__: [row])
    assert bench_compile.run(_arguments("--out", str(tmp_path))) == int(broken)
    text = capsys.readouterr().out
    where = "kernel sm_90 bfloat16 [K=64] BT=64 BS=32, 4 warps, 2 stages"
    assert (f"BROKEN {where}: spills 8 bytes" in text) == broken
    content = json.loads((tmp_path / "compile.json").read_text())
    assert content["ok"] != broken
    assert content["rows"][0]["tiles"] == {"BT": 64, "BS": 32}


def test_nothing_to_do_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BenchError, match="no case matches --dtypes and"):
        bench_compile.run(_arguments("--dtypes", "float64", "--out", str(tmp_path)))
    with pytest.raises(BenchError, match="--jobs must be at least 1, got 0"):
        bench_compile.run(_arguments("--jobs", "0"))


def test_cases_can_travel_to_another_process() -> None:
    cases = compile_cases()
    assert pickle.loads(pickle.dumps(cases)) == cases
    labels = [(case.launchers, case.dtype, case.label) for case in cases]
    assert len(set(labels)) == len(labels)
