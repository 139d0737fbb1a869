"""``python -m bench verify``: every usable implementation, function and dtype against float64.

Judged by the budget of ``attnvariants/_verify.py``: twice the error of the definition run in the
same precision, plus one rounding; near misses are measured again on other roundings. Writes
``verify.json``; exits with 1 where anything fails.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import attnvariants
from attnvariants._select import FUNCTIONS, IMPLEMENTATIONS, has_backward
from attnvariants._verify import Comparison, compare, exact_and_error, round_to, settle, within
from bench.cases import Case
from bench.console import make_console, progress
from bench.environment import describe, one_line
from bench.errors import BenchError
from bench.records import write_json
from bench.timing import lost
from bench.verify_cases import verify_cases
from bench.verify_rows import NotRun, Row, show, summarize
from bench.workers import run_tasks

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench verify``."""
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, help="default: all")
    parser.add_argument(
        "--impls", nargs="+", choices=IMPLEMENTATIONS, help="default: all that are usable here"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="a few cases per function")
    parser.add_argument(
        "--wide", action="store_true", help="head dims of 64 to 256 too (default: on a GPU only)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder for results")


def run(args: argparse.Namespace) -> int:
    """Verifies, prints the table and writes ``verify.json``; 1 where anything failed."""
    device = pick_device(args.device)
    console = make_console()
    environment = describe()
    console.print(one_line(environment), markup=False)
    if args.jobs < 1:
        raise BenchError(f"--jobs must be at least 1, got {args.jobs}")
    start = time.perf_counter()
    path = args.out / "verify.json"

    def save(rows: Sequence[Row], not_run: Sequence[NotRun], complete: bool = False) -> None:
        content = {
            "environment": environment,
            "device": str(device),
            "quick": args.quick,
            "complete": complete,
            "seconds": time.perf_counter() - start,
            "ok": all(row.ok for row in rows),
            "summary": summarize(rows),
            "rows": [{**vars(row), "ratio": row.ratio} for row in rows],
            "not_run": not_run,
        }
        write_json(path, content)

    rows, not_run = verify(
        verify_cases(args.functions, quick=args.quick, wide=args.wide or device.type == "cuda"),
        args.impls or IMPLEMENTATIONS,
        args.dtypes or list(DTYPES),
        device,
        console,
        jobs=args.jobs,
        save=save,
    )
    seconds = time.perf_counter() - start
    if not rows:
        reasons = "; ".join(sorted({f"{n.impl}: {n.reason}" for n in not_run}))
        raise BenchError(f"nothing to verify here: {reasons}")
    failed = [row for row in rows if not row.ok]
    show(console, rows, not_run)
    verdict = f"{len(failed)} of {len(rows)} comparisons FAILED" if failed else "all passed"
    console.print(f"{len(rows)} comparisons in {seconds:.1f} s on {device}: {verdict}")
    save(rows, not_run, complete=True)
    write_json(args.out / "environment.json", environment)
    console.print(f"written: {path}", markup=False)
    return 1 if failed else 0


def pick_device(name: str | None) -> torch.device:
    """The device of a run; refuses one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BenchError(f"--device {name}: not a device; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise BenchError(f"--device {name}: use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchError(f"--device {name}: this PyTorch sees no CUDA device; use --device cpu")
    return device


# --- comparing -----------------------------------------------------------------------------------


def verify(
    cases: Sequence[Case],
    impls: Sequence[str],
    dtypes: Sequence[str],
    device: torch.device,
    console: Console,
    *,
    jobs: int = 1,
    save: Callable[[Sequence[Row], Sequence[NotRun]], None] = lambda *_: None,
) -> tuple[list[Row], list[NotRun]]:
    """Checks every case in every implementation and dtype; ``save`` is called after each pair.

    With several ``jobs`` each pair is checked in a process of its own, so that a kernel that
    breaks the device or its process costs no other comparison.
    """
    available = attnvariants.implementations()
    rows: list[Row] = []
    not_run: list[NotRun] = []
    tasks: list[Task] = []
    for function in dict.fromkeys(case.function for case in cases):
        own = tuple(case for case in cases if case.function == function)
        for impl in impls:
            entry = available[function][impl]
            if entry.usable:
                tasks += [Task(function, impl, dtype, own, str(device)) for dtype in dtypes]
            else:
                not_run.append(NotRun(function, impl, "", "", entry.reason))
    with progress(console, len(tasks)) as step:
        for task, found, left_out in (_in_workers if jobs > 1 else _here)(tasks, jobs, step):
            rows += found
            not_run += left_out
            if not task.cases:  # the last news of it
                save(rows, not_run)
    order = [(task.function, task.impl, task.dtype) for task in tasks]
    rows.sort(key=lambda row: order.index((row.function, row.impl, row.dtype)))
    return rows, not_run


@dataclass(frozen=True)
class Task:
    """All cases of one function in one implementation and dtype."""

    function: str
    impl: str
    dtype: str
    cases: tuple[Case, ...]
    device: str


News = tuple[Task, list[Row], list[NotRun]]  # the task with the cases that are left


def _here(tasks: Sequence[Task], jobs: int, step: Callable[[str], None]) -> Iterator[News]:
    for task in tasks:
        step(f"{task.function} {task.impl} {task.dtype}")
        for number, case in enumerate(task.cases, 1):
            yield replace(task, cases=task.cases[number:]), *_check(task, case)


def _in_workers(tasks: Sequence[Task], jobs: int, step: Callable[[str], None]) -> Iterator[News]:
    """A process that ends costs the case that it was at; a new one goes on behind that."""
    for task in tasks:
        step(f"{task.function} {task.impl} {task.dtype}")
    waiting = list(tasks)
    while waiting:
        left = dict(enumerate(waiting))
        ended = set()  # behind a case that is reported
        for message in run_tasks(check_task, waiting, jobs):
            task = left[message.task]
            if message.kind == "progress":
                found, left_out = message.value
                left[message.task] = replace(task, cases=task.cases[1:])
                if any(lost(row.reason) for row in found):
                    ended.add(message.task)
                yield left[message.task], found, left_out
            elif message.kind == "failed" and task.cases and message.task not in ended:
                row = _failed(task, task.cases[0], message.value.message)
                left[message.task] = replace(task, cases=task.cases[1:])
                yield left[message.task], [row], []
        waiting = [task for task in left.values() if task.cases]


def check_task(task: Task, report: Callable[[Any], None]) -> None:
    """Checks a task in a worker process, which ends where its device is lost."""
    for case in task.cases:
        rows, not_run = _check(task, case)
        report((rows, not_run))
        if any(lost(row.reason) for row in rows):
            os._exit(1)  # nothing that this process could still do would be right


def _check(task: Task, case: Case) -> tuple[list[Row], list[NotRun]]:
    labels = (task.function, task.impl, task.dtype, case.name)
    try:
        found = check(case, task.impl, DTYPES[task.dtype], torch.device(task.device))
    except NotImplementedError as error:
        return [], [NotRun(*labels, str(error))]
    except Exception as error:
        return [_failed(task, case, f"{type(error).__name__}: {error}")], []
    return [Row(*labels, c.name, c.error, c.budget, c.ok) for c in found], []


def _failed(task: Task, case: Case, reason: str) -> Row:
    labels = (task.function, task.impl, task.dtype, case.name)
    return Row(*labels, "call", math.nan, 0.0, False, reason)


def check(
    case: Case, impl: str, dtype: torch.dtype, device: torch.device, *, gradients: bool = True
) -> list[Comparison]:
    """Compares every output, and every gradient where there are any, with float64."""

    def tensors(seed: int = 0) -> dict[str, Tensor]:  # the same numbers on every device
        return {name: tensor.to(device) for name, tensor in case.tensors(seed=seed).items()}

    if case.function == "attention_decode":
        return settle(lambda attempt: _check_decode(case, tensors(attempt), impl, dtype))
    if case.function == "linear_attention_decode":
        return settle(lambda attempt: _check_linear_decode(case, tensors(attempt), impl, dtype))
    gradients = gradients and has_backward(case.function, impl)
    return compare(
        case.function, tensors(), case.options, impl=impl, dtype=dtype, gradients=gradients
    )


def _check_decode(
    case: Case, tensors: Mapping[str, Tensor], impl: str, dtype: torch.dtype
) -> list[Comparison]:
    """Steps through a filled cache against the definition on the whole sequence."""
    options = dict(case.options)
    window = options.pop("window", None)
    working = _rounded(tensors, dtype)
    truth, errors = _whole_sequence("gated_sdpa", working, {**options, "window": window}, dtype)

    k, v = working["k"], working["v"]
    cached = case.keys - case.length
    cache = attnvariants.KVCache(
        case.batch,
        case.keys,
        case.key_heads,
        case.key_dim,
        case.values,
        window=window,
        dtype=dtype,
        device=k.device,
    )
    if cached:
        cache.append(k[:, :cached], v[:, :cached])
    step: Callable[..., Any] = attnvariants.attention_decode
    outputs = []
    for new in _pieces(case.steps):
        old = slice(cached + new.start, cached + new.stop)
        q, gate = (working[name][:, new] if name in working else None for name in ("q", "gate"))
        outputs.append(step(q, k[:, old], v[:, old], cache, gate=gate, impl=impl, **options))
    found = within("out", torch.cat(outputs, 1), truth["out"], errors["out"], dtype)
    lengths = float((cache.lengths - case.keys).abs().max())
    return [found, Comparison("lengths", lengths, 0.0)]


def _check_linear_decode(
    case: Case, tensors: Mapping[str, Tensor], impl: str, dtype: torch.dtype
) -> list[Comparison]:
    """Steps of the recurrence against the definition on the whole sequence."""
    options = dict(case.options)
    working = _rounded(tensors, dtype)
    arguments = dict(working)
    definition = "gated_linear_attention"
    if "feature_map" in options:  # norm linear attention has no scale: pass 1
        definition = "norm_linear_attention"
        arguments["decay"] = arguments.pop("g")
        options.pop("scale")
    truth, errors = _whole_sequence(definition, arguments, {**options, "return_state": True}, dtype)

    q, k, v = (working[name] for name in ("q", "k", "v"))
    g, gate = working.get("g"), working.get("gate")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = attnvariants.RecurrentState(
        case.batch, case.heads, case.key_dim, case.values, dtype=wide, device=q.device
    )
    if "initial_state" in working:
        state.state.copy_(working["initial_state"])
    outputs = [
        attnvariants.linear_attention_decode(
            q[:, new],
            k[:, new],
            v[:, new],
            g if g is None or g.dim() == 1 else g[:, new],
            state,
            norm_weight=working.get("norm_weight"),
            gate=None if gate is None else gate[:, new],
            impl=impl,
            **case.options,
        )
        for new in _pieces(case.steps)
    ]
    return [
        within("out", torch.cat(outputs, 1), truth["out"], errors["out"], dtype),
        within("state", state.state, truth["state"], errors["state"], wide),
    ]


def _whole_sequence(
    name: str, working: Mapping[str, Tensor], options: Mapping[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the definition gives for the whole sequence, and its error in plain ``dtype``."""
    home = importlib.import_module(f"attnvariants.reference.{name}")
    definition: Callable[..., Any] = getattr(home, name)

    def define(inputs: Mapping[str, Tensor | None], _: torch.dtype) -> dict[str, Tensor]:
        result = definition(**inputs, **options, upcast=False)
        parts = result if isinstance(result, tuple) else (result,)
        return dict(zip(("out", "state"), parts, strict=False))

    return exact_and_error(define, working, dtype)


def _rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    rounded = {name: round_to(name, tensor, dtype) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in rounded.items() if tensor is not None}


def _pieces(steps: Sequence[int]) -> list[slice]:
    ends = [sum(steps[: n + 1]) for n in range(len(steps))]
    return [slice(end - size, end) for size, end in zip(steps, ends, strict=True)]
