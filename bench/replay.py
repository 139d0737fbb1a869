"""``python -m bench replay``: CUDA graphs and side streams give what plain calls give, bit for bit.

With ``--large`` also the last row of a batch with more than 2^31 elements is what it is alone.

Every call is made on the default stream, then on another one, then on two at a time, and captured
in a CUDA graph that is replayed, also after its inputs have changed; decode steps carry on from
step to step. Writes ``replay.json``; exits with 1 where anything differs.

On a CPU, where there are neither streams nor graphs, a small call is made again instead: that tries
the command out and shows nothing about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import attnvariants
from attnvariants._select import FUNCTIONS, IMPLEMENTATIONS
from bench.cases import DECODE, FORWARD, TRAINING, Case
from bench.console import make_console, progress
from bench.environment import describe, one_line
from bench.errors import BenchError
from bench.records import write_json
from bench.replay_cases import CASES, Call, Outputs, make_call, small
from bench.replay_large import ELEMENTS, difference_of_last_row
from bench.timing import lost, reason
from bench.verify import DTYPES, pick_device

LARGE, NOT_CHECKED = "last row of a large batch", "not checked"
STEPS = 3  # replays of a graph, one behind the other


@dataclass(frozen=True)
class Row:
    """One check of one call; ``reason`` says what differs, or why it could not be made."""

    function: str
    case: str
    mode: str
    impl: str
    dtype: str
    check: str
    ok: bool
    reason: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench replay``."""
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, help="default: all")
    parser.add_argument(
        "--impls", nargs="+", choices=IMPLEMENTATIONS, help="default: all kernels usable here"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument(
        "--large",
        metavar="ELEMENTS",
        nargs="?",
        type=int,
        const=ELEMENTS,
        help="also a batch with tensors of so many elements (default: %(const)s; takes 50 GB)",
    )
    parser.add_argument(
        "--only-calls", action="store_true", help="only make every call once: for a sanitizer"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder for results")


def run(args: argparse.Namespace) -> int:
    """Makes all checks, prints what failed and writes ``replay.json``; 1 where anything failed."""
    device = pick_device(args.device)
    console = make_console()
    environment = describe()
    console.print(one_line(environment), markup=False, soft_wrap=True)
    cases = CASES if device.type == "cuda" else [small(case) for case in CASES]
    cases = [case for case in cases if not args.functions or case.function in args.functions]
    jobs = list(_jobs(cases, args.impls or ("cuda", "triton"), args.dtypes))
    if not jobs:
        raise BenchError("no kernel is usable here; python -m attnvariants says why, or --impls")
    rows: list[Row] = []
    path = args.out / "replay.json"
    with progress(console, len(jobs)) as step:
        for case, mode, impl, dtype in jobs:
            step(f"{case.function} {impl} {dtype}, {mode} [{case.name}]")
            labels = (case.function, case.name, mode, impl, dtype)
            call = (case, mode, impl, DTYPES[dtype], device)
            found = list(_check(*call, only_call=args.only_calls))
            if args.large and not (args.only_calls or any(lost(why) for _, why in found)):
                found.append((LARGE, _large(*call, args.large)))
            for check, why in found:
                rows.append(Row(*labels, check, not why or why.startswith(NOT_CHECKED), why))
            write_json(path, _content(environment, device, rows, complete=False))
            if any(lost(row.reason) for row in rows):
                break
        else:
            write_json(path, _content(environment, device, rows, complete=True))
    failed = [row for row in rows if not row.ok]
    _show(console, rows, failed, device)
    console.print(f"written: {path}", markup=False)
    return 1 if failed else 0


def _jobs(
    cases: Sequence[Case], impls: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[Case, str, str, str]]:
    available = attnvariants.implementations()
    for case in cases:
        for impl in impls:
            if available[case.function][impl].usable:
                modes = (FORWARD,) if case.function in DECODE else (FORWARD, TRAINING)
                for mode in modes:
                    for dtype in dtypes:
                        yield case, mode, impl, dtype


def _content(
    environment: dict[str, Any], device: torch.device, rows: Sequence[Row], *, complete: bool
) -> dict[str, Any]:
    ok = all(row.ok for row in rows)
    found = {"environment": environment, "device": str(device), "complete": complete}
    return {**found, "ok": ok, "rows": rows}


def _show(
    console: Console, rows: Sequence[Row], failed: Sequence[Row], device: torch.device
) -> None:
    for row in failed:
        console.print(
            f"FAILED {row.function} {row.impl} {row.dtype}, {row.mode} [{row.case}] "
            f"{row.check}: {row.reason}",
            style="red",
            markup=False,
            soft_wrap=True,
        )
    for text in dict.fromkeys(f"{row.impl}: {row.reason}" for row in rows if row.ok and row.reason):
        console.print(text, markup=False, soft_wrap=True)
    verdict = f"{len(failed)} of {len(rows)} checks FAILED" if failed else "all passed"
    note = "" if device.type == "cuda" else "; a CPU has no streams and no graphs"
    console.print(f"{len(rows)} checks on {device}: {verdict}{note}", markup=False)


def _large(
    case: Case, mode: str, impl: str, dtype: torch.dtype, device: torch.device, elements: int
) -> str:
    try:
        why = difference_of_last_row(case, impl, dtype, device, elements, training=mode == TRAINING)
        _synchronize(device)
    except (torch.OutOfMemoryError, NotImplementedError) as error:
        why = f"{NOT_CHECKED}: {reason(error)}"
    except Exception as error:
        why = reason(error)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return why


# --- checking ------------------------------------------------------------------------------------


def _check(
    case: Case, mode: str, impl: str, dtype: torch.dtype, device: torch.device, *, only_call: bool
) -> Iterator[tuple[str, str]]:
    """Each check with what is wrong; empty where nothing is."""
    training = mode == TRAINING
    try:
        call, other = (
            make_call(case, impl, dtype, device, training=training, seed=seed) for seed in (0, 1)
        )
        expected, changed = _plain(call), _plain(other)
        _synchronize(device)
    except NotImplementedError as error:  # says so itself, and is no wrong result
        yield "plain call", f"{NOT_CHECKED}: {reason(error)}"
        return
    except Exception as error:
        yield "plain call", reason(error)
        return
    yield "plain call", ""
    if only_call:
        return
    checks: dict[str, Callable[[], str]] = {
        "side stream": lambda: _on_side_stream(call, expected, device),
        "two streams": lambda: _on_two_streams(call, other, expected, changed, device),
        "graph": lambda: _in_a_graph(call, call, expected, device),
        "graph, new inputs": lambda: _in_a_graph(call, other, changed, device),
    }
    for name, check in checks.items():
        try:
            yield name, check()
        except Exception as error:
            yield name, reason(error)


def _plain(call: Call) -> list[Outputs]:
    """Outputs and state of each of several steps."""
    call.reset()
    return [_step(call.run, call) for _ in range(STEPS)]


def _step(run: Callable[[], Outputs], call: Call) -> Outputs:
    return [x.clone() for x in (*run(), *call.state)]


def _on_side_stream(call: Call, expected: Sequence[Outputs], device: torch.device) -> str:
    with _side_stream(device):
        found = _plain(call)
    _synchronize(device)
    return _difference(found, expected)


def _on_two_streams(
    call: Call,
    other: Call,
    expected: Sequence[Outputs],
    changed: Sequence[Outputs],
    device: torch.device,
) -> str:
    """Two calls that do not wait for each other."""
    call.reset()
    other.reset()
    _synchronize(device)
    found: list[Outputs] = []
    found_other: list[Outputs] = []
    streams = [_side_stream(device) for _ in range(2)]
    for _ in range(STEPS):
        for stream, one, into in zip(streams, (call, other), (found, found_other), strict=True):
            with stream:
                into.append(_step(one.run, one))
    _synchronize(device)
    return _difference(found, expected) or _difference(found_other, changed)


def _in_a_graph(call: Call, inputs: Call, expected: Sequence[Outputs], device: torch.device) -> str:
    """Captures ``call``, gives its tensors the values of ``inputs``, and replays it."""
    kept = {name: x.detach().clone() for name, x in call.inputs.items()}
    outputs, replay = _record(call, device)
    try:
        with torch.no_grad():
            for name, tensor in call.inputs.items():
                tensor.copy_(inputs.inputs[name])
        call.reset()
        inputs.reset()
        for mine, theirs in zip(call.state, inputs.state, strict=True):
            mine.copy_(theirs)
        found = []
        for _ in expected:
            replay()
            found.append([x.clone() for x in (*outputs, *call.state)])
        _synchronize(device)
    finally:
        with torch.no_grad():
            for name, tensor in call.inputs.items():
                tensor.copy_(kept[name])
    return _difference(found, expected)


def _record(call: Call, device: torch.device) -> tuple[Outputs, Callable[[], Any]]:
    """The outputs of a captured call, and what runs it again."""
    call.reset()
    if device.type != "cuda":
        outputs = call.run()

        def again() -> None:
            for output, new in zip(outputs, call.run(), strict=True):
                output.copy_(new)

        return outputs, again
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            call.run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outputs = call.run()
    return outputs, graph.replay


def _side_stream(device: torch.device) -> Any:
    if device.type != "cuda":
        return contextlib.nullcontext()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(side)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(found: Sequence[Outputs], expected: Sequence[Outputs]) -> str:
    for step, (outputs, others) in enumerate(zip(found, expected, strict=True)):
        for number, (one, other) in enumerate(zip(outputs, others, strict=True)):
            if not _same(one, other):
                return f"output {number} of step {step} is not that of a plain call"
    return ""


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
