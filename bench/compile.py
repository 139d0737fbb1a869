"""``python -m bench compile``: every kernel and configuration, compiled ahead of time.

Needs no GPU. Shows what would make a kernel slow or impossible before one is rented: registers
that spill, more shared memory than the chip has, scores that miss the tensor cores. Writes
``compile.json``; exits with 1 where a kernel breaks a rule (:func:`problems`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.accepted_spills import ACCEPTED, AcceptedSpill
from bench.ahead_of_time import Compiled, compiling_for, refuse_interpreter
from bench.compile_cases import CompileCase, compile_cases
from bench.console import make_console, progress
from bench.cubin import SHARED_LIMIT, TENSOR_MEMORY_LIMIT, Resources, inspect
from bench.environment import describe, one_line
from bench.errors import BenchError
from bench.records import write_json
from bench.timing import reason
from bench.verify import DTYPES
from bench.workers import Failure, run_tasks

ARCHS = (80, 86, 90, 100, 120)


@dataclass(frozen=True)
class Row:
    """One binary on one chip. ``also`` names the other cases that use the same one."""

    kernel: str
    case: str
    dtype: str
    arch: int
    tiles: dict[str, int] = field(default_factory=dict)
    warps: int = 0
    stages: int = 0
    registers: int = 0
    stack: int = 0  # bytes per thread
    spills: int = 0  # loads and stores of the stack
    shared: int = 0  # bytes per block
    shared_limit: int = 0
    tensor_memory: int = 0  # columns
    tensor_cores: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    seconds: float = 0.0
    cached: bool = False
    key: str = ""
    problems: tuple[str, ...] = ()
    accepted: str = ""  # why its spills are
    also: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Where to look: kernel, chip, dtype, case and configuration."""
        return (
            f"{self.kernel} sm_{self.arch} {self.dtype} [{self.case}] "
            f"{configuration(self.tiles)}, {self.warps} warps, {self.stages} stages"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench compile``."""
    parser.add_argument(
        "--archs",
        nargs="+",
        type=int,
        choices=SHARED_LIMIT,
        default=list(ARCHS),
        help=f"compute capabilities; default: {' '.join(map(str, ARCHS))}",
    )
    parser.add_argument(
        "--kernels", nargs="+", help="only kernels whose name contains one of these"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all of the cases")
    parser.add_argument(
        "--quick", action="store_true", help="every entry of the configuration tables once"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder for results")


def run(args: argparse.Namespace) -> int:
    """Compiles, prints the table and writes ``compile.json``; 1 where a rule is broken."""
    refuse_interpreter()
    if args.jobs < 1:
        raise BenchError(f"--jobs must be at least 1, got {args.jobs}")
    cases = [
        case
        for case in compile_cases(quick=args.quick)
        if (not args.dtypes or case.dtype in args.dtypes)
        and any(_wanted(name, args.kernels) for name in case.kernels)
    ]
    if not cases:
        raise BenchError("nothing to compile: no case matches --dtypes and --kernels")
    console = make_console()
    environment = describe()
    console.print(one_line(environment), markup=False, soft_wrap=True)
    start = time.perf_counter()
    rows = compile_all(cases, args.archs, console, jobs=args.jobs, kernels=args.kernels)
    seconds = time.perf_counter() - start
    show(console, rows)
    broken = [row for row in rows if row.problems]
    verdict = f"{len(broken)} of {len(rows)} binaries BREAK A RULE" if broken else "no rule broken"
    compiler = sum(row.seconds for row in rows if not row.cached)
    console.print(
        f"{len(rows)} binaries of {len(cases)} cases in {seconds:.0f} s "
        f"({compiler:.0f} s in the compiler): {verdict}"
    )
    path = args.out / "compile.json"
    content = {
        "environment": environment,
        "quick": args.quick,
        "archs": args.archs,
        "seconds": seconds,
        "ok": not broken,
        "rows": rows,
    }
    write_json(path, content)
    console.print(f"written: {path}", markup=False)
    return 1 if broken else 0


# --- compiling -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One case on one chip; of the kernels that it launches, those whose name matches."""

    case: CompileCase
    arch: int
    kernels: tuple[str, ...] = ()


def compile_all(
    cases: Sequence[CompileCase],
    archs: Sequence[int],
    console: Console,
    *,
    jobs: int = 1,
    kernels: Sequence[str] | None = None,
) -> list[Row]:
    """One row per binary, by chip and in the order of the cases."""
    tasks = [Task(case, arch, tuple(kernels or ())) for arch in archs for case in cases]
    found: dict[int, list[Row]] = {}
    with progress(console, len(tasks)) as step:
        for index, answer in in_workers(compile_task, tasks, jobs):
            task = tasks[index]
            step(f"sm_{task.arch} {task.case.dtype} {task.case.label}")
            found[index] = (
                [_failed(task, answer.message)] if isinstance(answer, Failure) else answer
            )
    return merge([row for index in sorted(found) for row in found[index]])


def in_workers(
    function: Callable[..., Any], tasks: Sequence[Any], jobs: int
) -> Iterator[tuple[int, Any]]:
    """The answer to every task, or its :class:`Failure`: a compiler may take its process down."""
    for message in run_tasks(function, tasks, jobs):
        if message.kind == "failed" and message.value.fatal:
            raise BenchError(message.value.message)
        if message.kind != "progress":
            yield message.task, message.value


def compile_task(task: Task, report: Callable[[Any], None]) -> list[Row]:
    """Compiles what one case launches, in a worker process."""
    return [
        row_of(one, task.case, ACCEPTED)
        for one in launches(task.case, task.arch)
        if _wanted(one.kernel, task.kernels) or one.error
    ]


def _wanted(kernel: str, parts: Sequence[str] | None) -> bool:
    return not parts or any(part in kernel for part in parts)


def launches(case: CompileCase, arch: int) -> list[Compiled]:
    """Everything that the calls of a case launch; a launcher that fails is in the list itself."""
    with compiling_for(arch) as found:
        try:
            for call in case.calls("cpu").values():
                call()
        except Exception as error:
            found.append(Compiled("launcher", arch, {}, 0, 0, 0.0, error=reason(error)))
    return found


def row_of(one: Compiled, case: CompileCase, accepted: Sequence[AcceptedSpill]) -> Row:
    """The row of one launch, judged."""
    base = Row(
        one.kernel,
        case.label,
        case.dtype,
        one.arch,
        one.tiles,
        one.warps,
        one.stages,
        shared=one.shared,
        shared_limit=SHARED_LIMIT[one.arch],
        tensor_memory=one.tensor_memory,
        seconds=one.seconds,
        cached=one.cached,
        key=one.key,
    )
    if one.error:
        return replace(base, problems=(f"does not compile: {one.error}",))
    used = inspect(one.cubin)
    excuse = next((entry for entry in accepted if entry.covers(one.kernel, one.arch, case)), None)
    allowed = excuse.stack if excuse else 0
    return replace(
        base,
        **vars(used),
        problems=problems(
            one, used, tensor_cores=case.needs_tensor_cores(one.kernel), stack=allowed
        ),
        accepted=excuse.reason if excuse and used.stack else "",
    )


def problems(
    one: Compiled, used: Resources, *, tensor_cores: bool, stack: int = 0
) -> tuple[str, ...]:
    """The rules that a binary breaks.

    Args:
        one: the launch.
        used: what its machine code uses.
        tensor_cores: whether it has to use them.
        stack: bytes per thread that it may spill.
    """
    found = []
    if used.stack > stack:
        most = f", accepted are {stack}" if stack else ""
        found.append(f"spills {used.stack} bytes per thread ({used.spills} instructions){most}")
    if one.shared > SHARED_LIMIT[one.arch]:
        found.append(f"{one.shared:,} bytes of shared memory, there are {SHARED_LIMIT[one.arch]:,}")
    if one.tensor_memory > TENSOR_MEMORY_LIMIT:
        columns = f"{one.tensor_memory} columns of tensor memory"
        found.append(f"{columns}, there are {TENSOR_MEMORY_LIMIT}")
    if tensor_cores and not used.tensor_cores:
        found.append("no tensor-core instructions")
    return tuple(found)


def merge(rows: Sequence[Row]) -> list[Row]:
    """Rows of equal binaries as one; a binary is judged as the strictest of its cases does."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row.arch, row.key) if row.key else (row.label, row.problems)
        first = found.setdefault(key, row)
        if first is row:
            continue
        new = row.case not in (first.case, *first.also)
        found[key] = replace(
            first,
            seconds=max(first.seconds, row.seconds),
            cached=first.cached and row.cached,
            problems=first.problems or row.problems,
            also=(*first.also, row.case) if new else first.also,
        )
    return list(found.values())


def _failed(task: Task, message: str) -> Row:
    limit = SHARED_LIMIT[task.arch]
    lost = (f"does not compile: {message}",)
    return Row(
        "launcher", task.case.label, task.case.dtype, task.arch, shared_limit=limit, problems=lost
    )


# --- showing -------------------------------------------------------------------------------------


def show(console: Console, rows: Sequence[Row]) -> None:
    """One table per kernel and chip, then every broken rule in full."""
    for kernel in dict.fromkeys(row.kernel for row in rows):
        for arch in dict.fromkeys(row.arch for row in rows if row.kernel == kernel):
            own = [row for row in rows if (row.kernel, row.arch) == (kernel, arch)]
            limit = f"{SHARED_LIMIT[arch] / 1024:.0f} KB of shared memory"
            console.print(_table(f"{kernel}, sm_{arch} ({limit})", own))
    for row in rows:
        for problem in row.problems:
            text = f"BROKEN {row.label}: {problem}"
            console.print(text, style="red", markup=False, soft_wrap=True)
        if row.accepted:
            text = f"accepted: {row.label}, {row.stack} bytes of stack: {row.accepted}"
            console.print(text, style="yellow", markup=False, soft_wrap=True)


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    names = max((row.tiles for row in rows), key=len)
    for name in ("dtype", "case", " ".join(names) or "tiles", "tensor cores"):
        table.add_column(name, no_wrap=name != "case")
    for name in ("warps", "stages", "registers", "stack", "KB", "instr.", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        more = f" (+{len(row.also)})" if row.also else ""
        table.add_row(
            row.dtype,
            row.case + more,
            " ".join(f"{row.tiles.get(name, 0):{len(name)}}" for name in names) or "-",
            " ".join(f"{name} {count}" for name, count in row.tensor_cores.items()) or "-",
            str(row.warps),
            str(row.stages),
            str(row.registers),
            str(row.stack),
            f"{row.shared / 1024:.0f}",
            str(row.instructions),
            "cached" if row.cached else f"{row.seconds:.1f}",
            "[red]BROKEN[/red]" if row.problems else "[green]ok[/green]",
        )
    return table


def configuration(tiles: dict[str, int]) -> str:
    """Tile sizes in a few characters."""
    return " ".join(f"{name}={size}" for name, size in tiles.items()) or "-"
