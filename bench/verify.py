"""``python -m bench verify``: every usable implementation, function and dtype against float64.

Judged by the budget of ``attnvariants/_verify.py``: twice the error of the definition run in the
same precision, plus one rounding; near misses are measured again on other roundings. Writes
``verify.json``; exits with 1 where anything fails.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import attnvariants
from attnvariants._select import FUNCTIONS, IMPLEMENTATIONS, has_backward
from attnvariants._verify import Comparison, compare, exact_and_error, round_to, settle, within
from bench.cases import Case
from bench.console import make_console, progress
from bench.environment import describe, one_line
from bench.errors import BenchError
from bench.records import write_json
from bench.verify_cases import verify_cases

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Row:
    """One output or gradient of one case. ``reason`` says why a call failed outright."""

    function: str
    impl: str
    dtype: str
    case: str
    name: str
    error: float
    budget: float
    ok: bool
    reason: str = ""

    @property
    def ratio(self) -> float:
        """Error over budget: up to 1 is within it."""
        if self.error <= self.budget:
            return self.error / self.budget if self.budget else 0.0
        return self.error / self.budget if self.budget else math.inf


@dataclass(frozen=True)
class NotRun:
    """What was left out, and why."""

    function: str
    impl: str
    dtype: str
    case: str
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench verify``."""
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, help="default: all")
    parser.add_argument(
        "--impls", nargs="+", choices=IMPLEMENTATIONS, help="default: all that are usable here"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="a few cases per function")
    parser.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder for results")


def run(args: argparse.Namespace) -> int:
    """Verifies, prints the table and writes ``verify.json``; 1 where anything failed."""
    device = pick_device(args.device)
    console = make_console()
    environment = describe()
    console.print(one_line(environment), markup=False)
    start = time.perf_counter()
    rows, not_run = verify(
        verify_cases(args.functions, quick=args.quick),
        args.impls or IMPLEMENTATIONS,
        args.dtypes or list(DTYPES),
        device,
        console,
    )
    seconds = time.perf_counter() - start
    if not rows:
        reasons = "; ".join(sorted({f"{n.impl}: {n.reason}" for n in not_run}))
        raise BenchError(f"nothing to verify here: {reasons}")
    failed = [row for row in rows if not row.ok]
    show(console, rows, not_run)
    verdict = f"{len(failed)} of {len(rows)} comparisons FAILED" if failed else "all passed"
    console.print(f"{len(rows)} comparisons in {seconds:.1f} s on {device}: {verdict}")
    path = args.out / "verify.json"
    content = {
        "environment": environment,
        "device": str(device),
        "quick": args.quick,
        "seconds": seconds,
        "ok": not failed,
        "summary": summarize(rows),
        "rows": [{**vars(row), "ratio": row.ratio} for row in rows],
        "not_run": not_run,
    }
    write_json(args.out / "environment.json", environment)
    write_json(path, content)
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
) -> tuple[list[Row], list[NotRun]]:
    """Checks every case in every implementation and dtype."""
    available = attnvariants.implementations()
    rows: list[Row] = []
    not_run: list[NotRun] = []
    functions = dict.fromkeys(case.function for case in cases)
    usable = []
    for function in functions:
        for impl in impls:
            entry = available[function][impl]
            if entry.usable:
                usable.append((function, impl))
            else:
                not_run.append(NotRun(function, impl, "", "", entry.reason))
    with progress(console, len(usable) * len(dtypes)) as step:
        for function, impl in usable:
            for dtype in dtypes:
                step(f"{function} {impl} {dtype}")
                for case in cases:
                    if case.function == function:
                        _check_into(rows, not_run, case, impl, dtype, device)
    return rows, not_run


def _check_into(
    rows: list[Row], not_run: list[NotRun], case: Case, impl: str, dtype: str, device: torch.device
) -> None:
    labels = (case.function, impl, dtype, case.name)
    try:
        found = check(case, impl, DTYPES[dtype], device)
    except NotImplementedError as error:
        not_run.append(NotRun(*labels, str(error)))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        rows.append(Row(*labels, "call", math.nan, 0.0, False, reason))
    else:
        rows += [Row(*labels, c.name, c.error, c.budget, c.ok) for c in found]


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


# --- showing -------------------------------------------------------------------------------------


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry per function, implementation and dtype, with its worst comparison."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.function, row.impl, row.dtype), []).append(row)
    return [
        {
            "function": function,
            "impl": impl,
            "dtype": dtype,
            "cases": len({row.case for row in group}),
            "comparisons": len(group),
            "failed": sum(not row.ok for row in group),
            "worst_ratio": _worst(group).ratio,
            "worst": f"{_worst(group).name} of {_worst(group).case}",
        }
        for (function, impl, dtype), group in groups.items()
    ]


def _worst(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: math.inf if math.isnan(row.ratio) else row.ratio)


def show(console: Console, rows: Sequence[Row], not_run: Sequence[NotRun]) -> None:
    """The summary as a table, failing comparisons in full, and what was not run."""
    table = Table(title="Largest error over its budget (1 is the limit)", title_justify="left")
    for name in ("function", "impl", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("cases", "comparisons", "worst"):
        table.add_column(name, justify="right")
    table.add_column("worst comparison")
    table.add_column("")
    previous = ""
    for entry in summarize(rows):
        if previous and entry["function"] != previous:
            table.add_section()
        previous = entry["function"]
        table.add_row(
            entry["function"],
            entry["impl"],
            entry["dtype"],
            str(entry["cases"]),
            str(entry["comparisons"]),
            f"{entry['worst_ratio']:.2f}",
            entry["worst"],
            f"[red]{entry['failed']} FAILED[/red]" if entry["failed"] else "[green]ok[/green]",
        )
    console.print(table)
    for row in rows:
        if not row.ok:
            what = row.reason or f"error {row.error:.3e} > budget {row.budget:.3e}"
            console.print(
                f"FAILED {row.function} {row.impl} {row.dtype} [{row.case}] {row.name}: {what}",
                style="red",
                markup=False,
                soft_wrap=True,
            )
    for (impl, reason), names in _by_reason(not_run).items():
        console.print(
            f"not run: {impl} for {', '.join(names)}: {reason}", markup=False, soft_wrap=True
        )


def _by_reason(not_run: Sequence[NotRun]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in not_run:
        name = " ".join(filter(None, (entry.function, entry.dtype)))
        name += f" [{entry.case}]" if entry.case else ""
        groups.setdefault((entry.impl, entry.reason), []).append(name)
    return groups
