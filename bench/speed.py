"""``python -m bench speed``: the variants beside their peers and the floor of the machine.

Writes ``speed.json`` after every case, so that what is there stays readable: ``environment``,
``protocol``, ``anchors``, ``noise``, ``flatness`` and ``rows``. A row is one contender in one
case, mode and dtype; ``ratio_to`` holds our time over a peer's, so below 1 ours is faster.
What fails ``verify`` is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from attnvariants._select import FUNCTIONS, IMPLEMENTATIONS, has_backward, interpreting
from bench import account, speed_tables, timing
from bench.cases import MODES, TRAINING, Case
from bench.console import make_console, progress
from bench.contenders import Candidate, InputSets, candidates, disagreement
from bench.environment import describe, disturbance, one_line
from bench.errors import BenchError
from bench.floors import CONVENTIONS, Work, work
from bench.records import write_json
from bench.speed_cases import SpeedCase, speed_cases
from bench.verify import DTYPES, check, pick_device
from bench.verify_cases import verify_cases

OK, MISSING, FAILED = "ok", "missing", "failed verify"
LONGEST_CALL = {"cpu": 4.0, "cuda": 1.0}  # seconds; calls with a higher floor are not timed
LINEAR_COST = frozenset({"gated_linear_attention", "norm_linear_attention", "diag_attention"})
MOST_DRIFT = 0.03  # of the anchors, beyond which absolute numbers mean little


@dataclass(frozen=True)
class Protocol:
    """How long to measure."""

    rounds: int
    budget_s: float  # per case and mode
    rest_s: float = 0.0  # pause between cases, for GPUs that are limited by power


@dataclass
class Row:
    """One contender in one case, mode and dtype."""

    case: str
    function: str
    mode: str
    shape: dict[str, Any]
    dtype: str
    contender: str
    ours: bool
    status: str
    reason: str | None = None
    median_s: float | None = None
    q20_s: float | None = None
    q80_s: float | None = None
    rounds: int | None = None
    peak_bytes: int | None = None
    tokens_per_s: float | None = None
    tflops: float | None = None
    gbytes_per_s: float | None = None
    floor_s: float | None = None
    percent_of_floor: float | None = None
    ratio_to: dict[str, dict[str, float]] = field(default_factory=dict)
    sweep: bool = False
    launch: str | None = None  # "eager" or "graph"
    eager_s: float | None = None  # one call without the CUDA graph
    input_sets: int | None = None
    cache_bytes: int | None = None  # of a decode step's cache or state
    flops: float | None = None
    bytes: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench speed``."""
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, help="default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all")
    parser.add_argument(
        "--impls",
        nargs="+",
        choices=IMPLEMENTATIONS,
        help="default: all that are usable here, but the reference and Triton's interpreter",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--lengths", nargs="+", type=_length, help="lengths of the sweep")
    parser.add_argument("--only-sweep", action="store_true", help="no cases but the sweep")
    parser.add_argument("--rounds", type=_length, help="rounds per case (default: 7, quick: 3)")
    parser.add_argument("--quick", action="store_true", help="small shapes, less than a minute")
    parser.add_argument(
        "--account",
        action="store_true",
        help="only print what the linear kernels move and compute, counted from their launches",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder for results")


def _length(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(args: argparse.Namespace) -> int:
    """Verifies, times, prints the tables and writes ``speed.json``; 1 where verify failed."""
    if args.account:
        return account.run(args)
    device = pick_device(args.device)
    console = make_console()
    dtypes = args.dtypes or (["bfloat16"] if device.type == "cuda" else ["float32"])
    cases = [
        entry
        for entry in speed_cases(device.type, quick=args.quick, lengths=args.lengths)
        if (not args.functions or entry.case.function in args.functions)
        and (not args.only_sweep or entry.sweep)
    ]
    jobs = [
        (entry, mode, dtype)
        for entry in cases
        for dtype in dtypes
        for mode in entry.modes
        if not args.modes or mode in args.modes
    ]
    if not jobs:
        raise BenchError("nothing to time: no case matches --functions, --modes and --only-sweep")
    protocol = Protocol(
        rounds=args.rounds or (3 if args.quick else 7),
        budget_s=0.5 if args.quick else 20.0,
        rest_s=2.0 if device.type == "cuda" and not args.quick else 0.0,
    )
    session = Session(device, args.impls, protocol, args.out / "speed.json")
    console.print(one_line(session.environment), markup=False, soft_wrap=True)
    busy = disturbance(session.environment)
    if busy:
        console.print(f"warning: {busy}", markup=False, style="yellow", soft_wrap=True)
    for line in CONVENTIONS:
        console.print(f"- {line}", markup=False, style="dim", soft_wrap=True)
    write_json(args.out / "environment.json", session.environment)
    session.measure(jobs, console)
    speed_tables.show(console, session.content(), MOST_DRIFT)
    console.print(f"written: {session.path}", markup=False)
    return 1 if any(row.status == FAILED for row in session.rows) else 0


class Session:
    """The measurements of one run, and the file they go to."""

    def __init__(
        self,
        device: torch.device,
        impls: Sequence[str] | None,
        protocol: Protocol,
        path: Path,
    ) -> None:
        self.device = device
        left_out = {"reference", "triton"} if interpreting() else {"reference"}
        self.impls = impls or [impl for impl in IMPLEMENTATIONS if impl not in left_out]
        self.protocol = protocol
        self.path = path
        self.environment = describe()
        self.stopwatch = timing.stopwatch_for(device)
        self.anchors: list[timing.Anchors] = []
        self.noise: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        self._verdicts: dict[tuple[str, str, str], str | None] = {}

    def measure(self, jobs: Sequence[tuple[SpeedCase, str, str]], console: Console) -> None:
        """Times all jobs, with the anchors before, between and after them."""
        dtypes = [DTYPES[name] for name in dict.fromkeys(dtype for _, _, dtype in jobs)]
        with progress(console, len(jobs) + 3) as step:
            for number, (entry, mode, dtype) in enumerate(jobs):
                if number in (0, len(jobs) // 2):
                    moment = "middle" if number else "start"
                    step(f"anchors, {moment}")
                    self.anchors.append(timing.measure_anchors(moment, self.device, dtypes))
                step(f"{entry.case.name}, {mode}, {dtype}")
                self.rows += self.time(entry, mode, dtype)
                self.write()
                time.sleep(self.protocol.rest_s)
            step("anchors, end")
            self.anchors.append(timing.measure_anchors("end", self.device, dtypes))
        self.write()

    def time(self, entry: SpeedCase, mode: str, dtype: str) -> list[Row]:
        """All contenders of one case in one mode and dtype, in interleaved rounds."""
        case = entry.case
        rows: dict[str, Row] = {}

        def row(candidate: Candidate, status: str, reason: str | None = None) -> None:
            rows[candidate.name] = Row(
                case.name,
                case.function,
                mode,
                case.shape,
                dtype,
                candidate.name,
                candidate.ours,
                status,
                reason,
                sweep=entry.sweep,
            )

        inputs = InputSets(case, mode, DTYPES[dtype], self.device)
        ready: list[Candidate] = []
        for candidate in candidates(entry, self.impls):
            if obstacle := self.refusal(candidate, case, mode, dtype):
                row(candidate, MISSING, obstacle)
            elif candidate.ours and (
                obstacle := self.verdict(case.function, candidate.name, dtype)
            ):
                row(candidate, FAILED, obstacle)
            elif not (ready or candidate.ours):
                row(candidate, MISSING, "not timed: nothing of ours to compare it with")
            elif obstacle := candidate.prepare(inputs) or disagreement(candidate, ready):
                row(candidate, FAILED if candidate.ours else MISSING, obstacle)
            else:
                ready.append(candidate)
                row(candidate, OK)
        if ready:
            self._interleave(ready, rows, inputs, noise=not entry.sweep)
        return list(rows.values())

    def refusal(self, candidate: Candidate, case: Case, mode: str, dtype: str) -> str | None:
        """Why a candidate has nothing to time, or would take too long."""
        if candidate.ours and mode == TRAINING and not has_backward(case.function, candidate.name):
            return "not timed: it has no backward"
        least = self._work(candidate, case, mode, dtype)
        floor = least.seconds(*timing.rates(self.anchors, DTYPES[dtype])) if self.anchors else 0.0
        if floor > LONGEST_CALL[self.device.type]:
            return f"not timed: a call takes more than {floor:.0f} s here"
        return None

    def verdict(self, function: str, impl: str, dtype: str) -> str | None:
        """Why an implementation may not be timed, from a quick comparison with float64."""
        key = (function, impl, dtype)
        if key not in self._verdicts:
            reasons = (
                self._complaint(case, impl, dtype) for case in verify_cases([function], quick=True)
            )
            self._verdicts[key] = next(filter(None, reasons), None)
        return self._verdicts[key]

    def _complaint(self, case: Case, impl: str, dtype: str) -> str | None:
        try:
            found = check(case, impl, DTYPES[dtype], self.device)
        except NotImplementedError:  # says so itself, and is no wrong result
            return None
        except Exception as error:
            return f"{timing.reason(error)} [{case.name}]"
        for one in found:
            if not one.ok:
                wrong = f"error {one.error:.2e} > budget {one.budget:.2e}"
                return f"{one.name} of [{case.name}]: {wrong}"
        return None

    def _interleave(
        self, ready: Sequence[Candidate], rows: dict[str, Row], inputs: InputSets, *, noise: bool
    ) -> None:
        contenders = [candidate.contender() for candidate in ready]
        again = ready[0].contender("again")
        timings, failures = timing.interleave(
            [*contenders, again] if noise else contenders,
            self.stopwatch,
            rounds=self.protocol.rounds,
            budget=self.protocol.budget_s,
        )
        for name, reason in failures.items():
            if name in rows:
                rows[name].status = FAILED if rows[name].ours else MISSING
                rows[name].reason = reason
        if noise and "again" in timings:
            first = rows[ready[0].name]
            same = timing.ratio(timings["again"], timings[ready[0].name])
            self.noise.append({"case": first.case, "mode": first.mode, **vars(same)})
        for candidate in ready:
            if candidate.name in timings:
                self._fill(rows[candidate.name], candidate, timings, inputs)

    def _fill(
        self, row: Row, candidate: Candidate, timings: dict[str, timing.Timing], inputs: InputSets
    ) -> None:
        own, case = timings[row.contender], inputs.case
        row.median_s = own.median
        row.q20_s, row.q80_s = own.quantile(0.2), own.quantile(0.8)
        row.rounds, row.launch, row.eager_s = len(own.rounds), own.launch, own.eager_s
        row.peak_bytes = timing.peak_bytes(candidate.once, self.device)
        row.input_sets, row.cache_bytes = inputs.count, candidate.cache_bytes
        row.tokens_per_s = case.batch * case.length / own.median
        least = self._work(candidate, case, row.mode, row.dtype)
        row.flops, row.bytes = least.flops, least.bytes
        row.tflops = least.flops / own.median / 1e12
        row.gbytes_per_s = least.bytes / own.median / 1e9
        if row.ours:
            others = {
                name: t for name, t in timings.items() if name not in (row.contender, "again")
            }
            row.ratio_to = {name: vars(timing.ratio(own, other)) for name, other in others.items()}

    def _work(self, candidate: Candidate, case: Case, mode: str, dtype: str) -> Work:
        return work(case if candidate.same else candidate.own_case(case), mode, DTYPES[dtype])

    # --- results ---------------------------------------------------------------------------------

    def content(self) -> dict[str, Any]:
        """Everything measured so far, with the floors at the rates measured so far."""
        for row in self.rows:
            if row.flops is not None and row.bytes is not None and row.median_s:
                rates = timing.rates(self.anchors, DTYPES[row.dtype])
                row.floor_s = Work(row.flops, row.bytes).seconds(*rates)
                row.percent_of_floor = 100 * row.floor_s / row.median_s
        return {
            "environment": self.environment,
            "protocol": {
                "rounds": self.protocol.rounds,
                "budget_s": self.protocol.budget_s,
                "order": "A B B A in every round; ratios are taken within a round",
                "ratio": "our time / time of the peer: below 1 ours is faster",
                "timer": "CUDA events around graph replays"
                if self.device.type == "cuda"
                else "wall clock",
                "memory": timing.MEMORY_NOTE[self.device.type],
                "conventions": list(CONVENTIONS),
            },
            "anchors": {
                "measured": self.anchors,
                "drift": timing.drift(self.anchors),
            },
            "noise": self.noise,
            "flatness": flatness(self.rows),
            "rows": self.rows,
        }

    def write(self) -> None:
        """Writes ``speed.json``."""
        write_json(self.path, self.content())


def flatness(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How constant the time per token is over the sweep, where the cost grows with the length."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.sweep and row.ours and row.status == OK and row.function in LINEAR_COST:
            key = (row.function, row.mode, row.dtype, row.contender)
            groups.setdefault(key, []).append(row)
    found = []
    for (function, mode, dtype, contender), group in groups.items():
        per_token = [1 / row.tokens_per_s for row in group if row.tokens_per_s]
        if len(per_token) < 2:
            continue
        mean = statistics.fmean(per_token)
        found.append(
            {
                "function": function,
                "mode": mode,
                "dtype": dtype,
                "contender": contender,
                "lengths": [row.shape["T"] for row in group],
                "deviation": max(abs(value / mean - 1) for value in per_token),
            }
        )
    return found
