"""Which configurations of a kernel are possible: found by compiling them, without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.compile import in_workers, launches, row_of
from bench.compile_cases import CompileCase, compile_cases, table_name
from bench.console import progress
from bench.errors import BenchError
from bench.strict_json import read_json
from bench.workers import Failure


@dataclass(frozen=True, order=True)
class Candidate:
    """One entry of a configuration table. ``BS`` is 0 for kernels that do not have it."""

    BT: int
    BS: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"Config({self.BT}, {self.BS}, {self.warps}, {self.stages})"


@dataclass
class Result:
    """What is known about a candidate on one chip."""

    arch: int
    candidate: Candidate
    registers: int = 0  # the most of all cases, like ``shared``
    shared: int = 0
    problem: str = ""  # why it is out
    current: bool = False  # what the table says
    median_s: dict[str, float] = field(default_factory=dict)  # by case
    ratio: float | None = None  # to the table's entry: geometric mean over the cases


def read_results(path: Path, kernel: str, archs: Sequence[int]) -> list[Result]:
    """What an earlier call with ``--prune-only`` found out about a kernel on these chips.

    Raises:
        BenchError: the file is about something else.
    """
    content = read_json(path)
    if content.get("kernel") != kernel:
        raise BenchError(f"{path} is about {content.get('kernel')}, not about {kernel}")
    found = [
        Result(**{**entry, "candidate": Candidate(**entry["candidate"])})
        for entry in content["results"]
        if entry["arch"] in archs
    ]
    if not found:
        raise BenchError(f"{path} has nothing about sm_{archs[0]}")
    return found


@dataclass(frozen=True)
class Task:
    """Candidates that differ in their stages only, on one chip; ``None``: the table's entry."""

    kernel: str
    cases: tuple[CompileCase, ...]
    arch: int
    candidates: tuple[Candidate | None, ...]


def prune(
    kernel: str,
    cases: Sequence[CompileCase],
    archs: Sequence[int],
    space: dict[str, tuple[int, ...]],
    console: Console,
    *,
    jobs: int = 1,
) -> list[Result]:
    """Every candidate on every chip with the reason why it is out, the table's entry first."""
    own = _launching(kernel, cases)
    tables = [Task(kernel, own, arch, (None,)) for arch in archs]
    current = {result.arch: result for result in _prune_tasks(tables, jobs, None)}
    tasks = []
    for arch, entry in current.items():
        sizes = space["BS"] if entry.candidate.BS else (0,)
        for BT, BS, warps in itertools.product(space["BT"], sizes, space["warps"]):
            stages = [Candidate(BT, BS, warps, count) for count in sorted(space["stages"])]
            others = tuple(one for one in stages if one != entry.candidate)
            if others:
                tasks.append(Task(kernel, own, arch, others))
    with progress(console, len(tasks)) as step:
        found = _prune_tasks(tasks, jobs, step)
    return [*current.values(), *sorted(found, key=lambda one: (one.arch, one.candidate))]


def _prune_tasks(
    tasks: Sequence[Task], jobs: int, step: Callable[[str], None] | None
) -> list[Result]:
    found: list[Result] = []
    for index, answer in in_workers(prune_task, tasks, jobs):
        task = tasks[index]
        if step:
            step(f"sm_{task.arch} {task.candidates[0]}")
        if not isinstance(answer, Failure):
            found += answer
        elif task.candidates == (None,):
            raise BenchError(f"the table's entry of {task.kernel}: {answer.message}")
        else:
            found += [
                Result(task.arch, one, problem=answer.message) for one in task.candidates if one
            ]
    return found


def prune_task(task: Task, report: Callable[[Any], None]) -> list[Result]:
    """Compiles candidates in a worker process; more stages only ever take more shared memory."""
    found: list[Result] = []
    for candidate in task.candidates:
        previous = found[-1].problem if found else ""
        if candidate and "shared memory" in previous:
            found.append(Result(task.arch, candidate, problem=f"as with fewer stages: {previous}"))
        else:
            found.append(_judge(task, candidate))
    return found


def _judge(task: Task, candidate: Candidate | None) -> Result:
    """All cases, up to the first in which the candidate breaks a rule."""
    result = Result(task.arch, candidate or Candidate(0, 0, 0, 0), current=candidate is None)
    for case in task.cases:
        with using(task.kernel, candidate):
            found = launches(case, task.arch)
        one = next((one for one in found if table_name(one.kernel) == task.kernel), found[-1])
        row = row_of(one, case, ())
        BT, BS = (row.tiles.get(name, 0) for name in ("BT", "BS"))
        used = Candidate(BT, BS, row.warps, row.stages)
        if candidate is None:
            result.candidate = used
        elif used != candidate and not one.error:
            result.problem = f"the launcher makes it {used} [{row.case}]"
            break
        result.registers = max(result.registers, row.registers)
        result.shared = max(result.shared, row.shared)
        if row.problems:
            result.problem = f"{row.problems[0]} [{row.case}]"
            break
    return result


def _launching(kernel: str, cases: Sequence[CompileCase]) -> tuple[CompileCase, ...]:
    """The cases that launch a kernel."""
    own = tuple(case for case in cases if kernel in case.kernels)
    if not own:
        known = sorted({name for case in compile_cases() for name in case.kernels})
        raise BenchError(f"no such kernel in these cases: {kernel}; there are {', '.join(known)}")
    return own


@contextlib.contextmanager
def using(kernel: str, candidate: Candidate | None) -> Iterator[None]:
    """Launches ``kernel`` with a candidate; with the table's entry for ``None``."""
    if candidate is None:
        yield
        return
    configs: Any = importlib.import_module("attnvariants.kernels._configs")
    config = configs.Config(*dataclasses.astuple(candidate))
    with configs.override(kernel, config):
        yield
