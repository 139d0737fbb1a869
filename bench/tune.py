"""``python -m bench tune``: which tile sizes, warps and stages one kernel should have.

Kernels take their configuration from a table that is written by hand (``kernels/_configs.py``).
This proposes its entries. Candidates that spill or ask for too much shared memory are pruned ahead
of time, on the processor; what is left is compared with the output of the table's entry and timed
beside it, on a GPU. Without one, ``--prune-only`` prints what is left. Writes ``tune.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attnvariants._select import interpreting
from bench import timing
from bench.ahead_of_time import refuse_interpreter
from bench.cases import DECODE, FORWARD, Case
from bench.compile import ARCHS
from bench.compile_cases import CompileCase, compile_cases
from bench.console import make_console, progress
from bench.contenders import AGREEMENT, InputSets
from bench.cubin import SHARED_LIMIT
from bench.environment import describe, one_line
from bench.errors import BenchError
from bench.pruning import Candidate, Result, prune, read_results, using
from bench.records import write_json
from bench.verify import DTYPES

SPACE: dict[str, tuple[int, ...]] = {
    "BT": (16, 32, 64, 128),
    "BS": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench tune``."""
    parser.add_argument("--kernel", required=True, help="name in the table: softmax_forward, ...")
    parser.add_argument("--case", default="", help="part of the names of the cases, as 'K=128 '")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--archs", nargs="+", type=int, choices=SHARED_LIMIT)
    parser.add_argument("--prune-only", action="store_true", help="compile only: needs no GPU")
    parser.add_argument(
        "--pruned", type=Path, metavar="JSON", help="tune.json of an earlier --prune-only: its rest"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (default: 1)")
    parser.add_argument("--length", type=int, default=4096, help="of the timed sequences")
    parser.add_argument("--heads", type=int, default=16, help="of the timed calls")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing (default: 7)")
    for name, values in SPACE.items():
        text = " ".join(map(str, values))
        parser.add_argument(f"--{name}", nargs="+", type=int, help=f"candidates; default: {text}")
    parser.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder for results")


def run(args: argparse.Namespace) -> int:
    """Prunes, times, prints the tables and writes ``tune.json``; 1 where nothing is left."""
    if args.pruned is None:
        refuse_interpreter()
    archs = _archs(args)
    cases = [
        case
        for case in compile_cases()
        if args.kernel in case.kernels
        and case.dtype == args.dtype
        and args.case in f"{case.label} "
    ]
    if not cases:
        raise BenchError(f"no case of {args.kernel} in {args.dtype} has {args.case!r} in its name")
    console = make_console()
    environment = describe()
    console.print(one_line(environment), markup=False, soft_wrap=True)
    space = {name: tuple(getattr(args, name) or values) for name, values in SPACE.items()}
    if args.pruned is None:
        results = prune(args.kernel, cases, archs, space, console, jobs=args.jobs)
    else:
        results = read_results(args.pruned, args.kernel, archs)
    survivors = [result for result in results if not result.problem]
    anchors = []
    if survivors and not args.prune_only:
        device = torch.device("cpu" if interpreting() else "cuda")
        larger = [enlarge(case, args.length, args.heads) for case in cases]
        dtype = [DTYPES[args.dtype]]
        anchors.append(timing.measure_anchors("start", device, dtype))
        measure(args.kernel, larger, survivors, console, device, args.rounds)
        anchors.append(timing.measure_anchors("end", device, dtype))
    for arch in archs:
        show(console, args.kernel, [result for result in results if result.arch == arch])
    if len(archs) > 1:
        common = ", ".join(map(str, everywhere(results))) or "none"
        console.print(f"left on all of these chips: {common}", markup=False, soft_wrap=True)
    content = {
        "environment": environment,
        "kernel": args.kernel,
        "dtype": args.dtype,
        "cases": [case.label for case in cases],
        "space": space,
        "timed": not args.prune_only,
        "anchors": {"measured": anchors, "drift": timing.drift(anchors) if anchors else 0.0},
        "results": results,
    }
    write_json(args.out / "tune.json", content)
    console.print(f"written: {args.out / 'tune.json'}", markup=False)
    return 0 if survivors else 1


def _archs(args: argparse.Namespace) -> list[int]:
    if args.prune_only:
        return args.archs or list(ARCHS)
    if interpreting() and args.archs and len(args.archs) == 1:
        return list(args.archs)  # tries the command out
    if not torch.cuda.is_available():
        raise BenchError("there is no CUDA device to time on; --prune-only needs none")
    major, minor = torch.cuda.get_device_capability()
    here = 10 * major + minor
    if here not in SHARED_LIMIT or args.archs not in (None, [here]):
        raise BenchError(f"this device is sm_{here}: times are taken for that one only")
    return [here]


# --- timing --------------------------------------------------------------------------------------


def enlarge(case: CompileCase, length: int, heads: int) -> CompileCase:
    """A case of the size that is timed: the same features, longer sequences and more heads."""
    small = case.case
    group = small.heads // small.key_heads
    if small.function in DECODE:  # a longer cache, not more new tokens
        keys, longer = length + small.length, 1
    else:
        longer = max(1, length // small.length)
        keys = small.keys * longer
    return dataclasses.replace(
        case,
        case=dataclasses.replace(
            small,
            length=small.length * longer,
            key_length=keys if small.key_length else None,
            heads=heads // group * group,
            kv_heads=heads // group,
            sequences=tuple(size * longer for size in small.sequences),
            options=_windows(small, heads // group),
        ),
    )


def _windows(case: Case, kv_heads: int) -> dict[str, Any]:
    """The options with as many windows as there are heads now, in the same proportion."""
    windows = case.options.get("window")
    if windows is None or isinstance(windows, int):
        return dict(case.options)
    share = [windows[index * len(windows) // kv_heads] for index in range(kv_heads)]
    return {**case.options, "window": tuple(share)}


@dataclass(frozen=True)
class Calls:
    """The call that launches a kernel on every set of inputs, and what undoes all of them."""

    calls: Sequence[Callable[[], Any]]
    reset: Callable[[], Any] = timing.nothing

    def first(self) -> list[Tensor]:
        self.reset()
        return _tensors(self.calls[0]())


def measure(
    kernel: str,
    cases: Sequence[CompileCase],
    survivors: Sequence[Result],
    console: Console,
    device: torch.device,
    rounds: int = 7,
) -> None:
    """Compares and times the survivors, interleaved; fills in the results."""
    current = next((result for result in survivors if result.current), None)
    if current is None:
        raise BenchError("the table's entry breaks a rule: nothing to compare with; --prune-only")
    stopwatch = timing.stopwatch_for(device)
    with progress(console, len(cases)) as step:
        for case in cases:
            step(case.label)
            calls = _calls(kernel, case, device)
            expected = calls.first()
            ready = []
            for result in survivors:
                result.problem = result.problem or _wrong(kernel, result, calls, expected)
                if not result.problem:
                    ready.append(_contender(kernel, result, calls))
            timings, failures = timing.interleave(ready, stopwatch, rounds=rounds, budget=60.0)
            for result in survivors:
                name = str(result.candidate)
                result.problem = result.problem or failures.get(name, "")
                if name in timings:
                    result.median_s[case.label] = timings[name].median
    _compare(survivors, current)


def _calls(kernel: str, case: CompileCase, device: torch.device) -> Calls:
    sets = InputSets(case.case, FORWARD, DTYPES[case.dtype], device).sets
    launchers = [case.launchers(case.case, tensors) for tensors in sets]

    def reset() -> None:
        for launcher in launchers:
            launcher.get("reset", timing.nothing)()

    return Calls([launcher[case.kernels[kernel]] for launcher in launchers], reset)


def _contender(kernel: str, result: Result, calls: Calls) -> timing.Contender:
    candidate = None if result.current else result.candidate

    def call(index: int) -> Any:
        with using(kernel, candidate):
            return calls.calls[index]()

    return timing.Contender(str(result.candidate), call, len(calls.calls), calls.reset)


def _wrong(kernel: str, result: Result, calls: Calls, expected: Sequence[Tensor]) -> str:
    """How the output of a candidate differs from that of the table's entry; empty where it fits."""
    with using(kernel, None if result.current else result.candidate):
        try:
            found = calls.first()
        except Exception as error:
            return timing.reason(error)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        apart = difference(one, other)
        if not apart <= AGREEMENT[other.dtype]:
            return f"output {number} differs from the table's by {apart:.1e}"
    return ""


def difference(one: Tensor, other: Tensor) -> float:
    """Relative difference; infinities have to be in the same places."""
    finite = other.isfinite()
    if not torch.equal(one.masked_fill(finite, 0), other.masked_fill(finite, 0)):
        return math.inf
    one, other = (x.masked_fill(~finite, 0).double() for x in (one, other))
    return float((one - other).norm() / other.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.numel()]


def _compare(survivors: Sequence[Result], current: Result) -> None:
    """Ratios of the cases' medians to those of the table's entry."""
    for result in survivors:
        if not result.problem and result.median_s.keys() == current.median_s.keys():
            result.ratio = statistics.geometric_mean(
                seconds / current.median_s[case] for case, seconds in result.median_s.items()
            )


# --- showing -------------------------------------------------------------------------------------


def show(console: Console, kernel: str, results: Sequence[Result]) -> None:
    """The table's entry, then what is left, best first, and how much was pruned."""
    (current,) = (result for result in results if result.current)
    left = [result for result in results if not result.problem]
    left.sort(key=lambda one: (one.ratio is None, one.ratio, not one.current, one.candidate))
    title = f"{kernel}, sm_{current.arch} ({SHARED_LIMIT[current.arch] / 1024:.0f} KB)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("candidate", no_wrap=True)
    for name in ("registers", "KB", "time / table's"):
        table.add_column(name, justify="right")
    table.add_column("")
    for result in left:
        table.add_row(
            str(result.candidate),
            str(result.registers),
            f"{result.shared / 1024:.0f}",
            "-" if result.ratio is None else f"{result.ratio:.3f}",
            "table" if result.current else "",
        )
    console.print(table)
    if current.problem:
        text = f"the table's entry {current.candidate} is out: {current.problem}"
        console.print(text, style="red", markup=False, soft_wrap=True)
    out = Counter(_kind(result.problem) for result in results if result.problem)
    reasons = "".join(f", {count} {kind}" for kind, count in out.most_common())
    console.print(f"{len(left)} of {len(results)} candidates are left{reasons}", markup=False)
    if left and left[0].ratio is not None:
        text = f"best: {left[0].candidate}, {left[0].ratio:.3f} of the table's {current.candidate}"
        console.print(text, markup=False)


def everywhere(results: Sequence[Result]) -> list[Candidate]:
    """The candidates that are left on every chip: what a shared entry of the table can be."""
    archs = {result.arch for result in results}
    left = Counter(result.candidate for result in results if not result.problem)
    return sorted(candidate for candidate, count in left.items() if count == len(archs))


def _kind(problem: str) -> str:
    """A reason in a few words."""
    kinds = {
        "spills": "spill",
        "shared memory": "take too much shared memory",
        "not compile": "do not compile",
        "differs": "give another result",
    }
    return next((text for sign, text in kinds.items() if sign in problem), "fail")
