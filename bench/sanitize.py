"""``python -m bench sanitize``: every kernel once under NVIDIA's compute-sanitizer.

``memcheck`` finds accesses out of bounds, ``racecheck`` hazards in shared memory. The calls are
those of ``python -m bench replay``, in a process of their own for each tool, function and
implementation, with PyTorch's caching allocator off: it hands out parts of large blocks, in which
an access beyond a tensor looks right. Writes ``sanitize.json``; exits with 1 where a tool
complains.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import attnvariants
from attnvariants._select import FUNCTIONS
from bench.console import make_console, progress
from bench.environment import describe, one_line
from bench.records import write_json
from bench.strict_json import read_json

SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
IMPLS = ("cuda", "triton")
COMPLAINT = 9  # exit code that the tools are asked for
_SUMMARY = re.compile(r"^=+ (ERROR SUMMARY|RACECHECK SUMMARY): (.*)$", re.MULTILINE)
_LINES = 40  # of a complaint that are kept


@dataclass(frozen=True)
class Row:
    """One tool on the calls of one function in one implementation."""

    tool: str
    function: str
    impl: str
    ok: bool
    summary: str  # the tool's own, or why there is none
    complaint: str = ""  # the first lines of what it found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench sanitize``."""
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, help="default: all")
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=list(IMPLS))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument(
        "--without-tool", action="store_true", help="only make the calls: to try the command out"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what was watched here at this commit"
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each process")
    parser.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder for results")


def run(args: argparse.Namespace) -> int:
    """Runs the tools and writes ``sanitize.json``; 1 where one complains."""
    console = make_console()
    environment = describe()
    console.print(one_line(environment), markup=False, soft_wrap=True)
    path = args.out / "sanitize.json"
    found = {"environment": environment, "sanitizer": shutil.which(SANITIZER)}
    if not (found["sanitizer"] or args.without_tool):
        write_json(path, {**found, "complete": True, "ok": True, "rows": []})
        console.print(f"{SANITIZER} is not on PATH (it comes with the CUDA toolkit): nothing ran")
        return 0
    available = attnvariants.implementations()
    jobs = [
        (tool, function, impl)
        for tool in (args.tools[:1] if args.without_tool else args.tools)
        for impl in args.impls
        for function in args.functions or FUNCTIONS
        if available[function][impl].usable
    ]
    rows = _earlier(path, environment["commit"]) if args.resume else []
    watched = {(row.tool, row.function, row.impl) for row in rows}
    with progress(console, len(jobs)) as step:
        for tool, function, impl in jobs:
            step(f"{tool}: {function} {impl}")
            if (tool, function, impl) not in watched:
                prefix = () if args.without_tool else command(tool)
                rows.append(watch(prefix, tool, function, impl, args.out, args.timeout))
            ok = all(row.ok for row in rows)
            complete = (tool, function, impl) == jobs[-1]
            write_json(path, {**found, "complete": complete, "ok": ok, "rows": rows})
    for row in rows:
        style = None if row.ok else "red"
        text = f"{row.tool} {row.function} {row.impl}: {row.summary}"
        console.print(text, style=style, markup=False, soft_wrap=True)
    console.print(f"written: {path}", markup=False)
    return 0 if all(row.ok for row in rows) else 1


def _earlier(path: Path, commit: str | None) -> list[Row]:
    """What an earlier call has watched at this commit."""
    if not path.exists():
        return []
    content = read_json(path)
    same = commit is not None and content["environment"]["commit"] == commit
    return [Row(**row) for row in content["rows"]] if same else []


def command(tool: str) -> tuple[str, ...]:
    """What stands before the command that is watched."""
    return (SANITIZER, "--tool", tool, "--error-exitcode", str(COMPLAINT), "--print-limit", "20")


def watch(
    prefix: Sequence[str], tool: str, function: str, impl: str, out: Path, timeout: float
) -> Row:
    """Makes the calls of one function, behind ``prefix``."""
    calls = [sys.executable, "-m", "bench", "replay", "--only-calls", "--out", str(out / "calls")]
    calls += ["--functions", function, "--impls", impl]
    if not prefix:
        calls += ["--device", "cpu", "--dtypes", "float32"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*prefix, *calls],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Row(tool, function, impl, False, f"not done after {timeout:.0f} s")
    return judge(tool, function, impl, done.returncode, done.stdout + done.stderr)


def judge(tool: str, function: str, impl: str, code: int, output: str) -> Row:
    """A row from what a process has printed and how it ended."""
    summaries = _SUMMARY.findall(output)
    summary = "; ".join(text for _, text in summaries) or f"exit code {code}"
    lines = output.strip().splitlines()
    marked = [line for line in lines if line.startswith("=========")]
    complaint = "" if code == 0 else "\n".join((marked or lines[-_LINES:])[:_LINES])
    return Row(tool, function, impl, code == 0, summary, complaint)
