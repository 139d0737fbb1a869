"""One run of ``python -m bench speed``: what it times, in which order, and what it keeps.

What fails ``verify`` is not timed. Everything is written after every case; a run that ended early,
by a kernel that broke the device or hangs as well, goes on behind it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console

from attnvariants._select import IMPLEMENTATIONS, has_backward, interpreting
from bench import timing
from bench.cases import DECODING, TRAINING, Case
from bench.console import progress
from bench.contenders import (
    MOST_SETS,
    Candidate,
    InputSets,
    cache_bytes,
    candidates,
    disagreement,
)
from bench.environment import describe
from bench.errors import BenchError
from bench.floors import CONVENTIONS, Work, work
from bench.records import write_json
from bench.speed_cases import SpeedCase
from bench.speed_rows import FAILED, MISSING, OK, Row, flatness
from bench.strict_json import read_json
from bench.verify import DTYPES, check
from bench.verify_cases import verify_cases

LONGEST_CALL = {"cpu": 4.0, "cuda": 1.0}  # seconds; calls with a higher floor are not timed
MOST_ATTEMPTS = 2  # at a job whose process ends while it runs
MOST_DRIFT = 0.03  # of the anchors, beyond which absolute numbers mean little


Job: TypeAlias = tuple[SpeedCase, str, str]  # with mode and dtype


@dataclass(frozen=True)
class Protocol:
    """How long to measure."""

    rounds: int
    budget_s: float  # per case and mode
    rest_s: float = 0.0  # pause between cases, for GPUs that are limited by power


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
        self.attempts: dict[str, int] = {}  # by job: begun, in this process or before
        self._verdicts: dict[tuple[str, str, str], str | None] = {}

    def resume(self, jobs: Sequence[Job], console: Console) -> list[Job]:
        """Takes over what this commit has timed on this device; returns the jobs that are left."""
        if not self.path.exists():
            return list(jobs)
        found = read_json(self.path)
        for name in ("commit", "gpu"):
            old, new = (_identity(e, name) for e in (found["environment"], self.environment))
            if old != new:
                text = f"{self.path} is of another {name} ({old}, now {new}): timing all of it anew"
                console.print(text, markup=False, soft_wrap=True)
                return list(jobs)
        self.rows = [Row(**row) for row in found["rows"]]
        self.anchors = [timing.Anchors(**entry) for entry in found["anchors"]["measured"]]
        self.noise = found["noise"]
        self.attempts = found["attempts"]
        done = {(row.case, row.mode, row.dtype) for row in self.rows}
        left = [job for job in jobs if (job[0].case.name, *job[1:]) not in done]
        for job in left:
            if self.attempts.get(_label(job), 0) >= MOST_ATTEMPTS:
                reason = f"not timed: the process ended {MOST_ATTEMPTS} times while it ran"
                self.rows.append(_nobody(job, FAILED, reason))
        return [job for job in left if self.attempts.get(_label(job), 0) < MOST_ATTEMPTS]

    def measure(self, jobs: Sequence[Job], console: Console) -> None:
        """Times all jobs, with the anchors before, between and after them.

        Raises:
            BenchError: a kernel has broken the CUDA context; what is left takes a new process.
        """
        if not jobs:
            self.write()
            return
        dtypes = [DTYPES[name] for name in dict.fromkeys(dtype for _, _, dtype in jobs)]
        with progress(console, len(jobs) + 3) as step:
            for number, (entry, mode, dtype) in enumerate(jobs):
                if number in (0, len(jobs) // 2):
                    moment = "middle" if number else "start"
                    step(f"anchors, {moment}")
                    self.anchors.append(timing.measure_anchors(moment, self.device, dtypes))
                job = entry, mode, dtype
                step(_label(job))
                self.attempts[_label(job)] = self.attempts.get(_label(job), 0) + 1
                self.write()
                found = self._time(job)
                self.rows += found
                self.write()
                if any(timing.lost(row.reason) for row in found):
                    raise BenchError(f"a kernel broke the device in {_label(job)}: --resume")
                if mode != DECODING:  # which is not limited by power
                    time.sleep(self.protocol.rest_s)
            step("anchors, end")
            self.anchors.append(timing.measure_anchors("end", self.device, dtypes))
        self.write()

    def _time(self, job: Job) -> list[Row]:
        self.stopwatch = timing.stopwatch_for(
            self.device
        )  # the old one holds the last job's caches
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the pools of graphs that are gone
        try:
            return self.time(*job)
        except torch.OutOfMemoryError as error:
            return [_nobody(job, MISSING, timing.reason(error))]

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
                row(candidate, _status(candidate.ours, obstacle), obstacle)
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
                rows[name].status = _status(rows[name].ours, reason)
                rows[name].reason = reason
        if noise and "again" in timings:
            first = rows[ready[0].name]
            same = timing.ratio(timings["again"], timings[ready[0].name])
            self.noise.append({"case": first.case, "mode": first.mode, **vars(same)})
        for candidate in ready:
            if candidate.name in timings:
                self._fill(rows[candidate.name], candidate, timings, inputs.case)

    def _fill(
        self, row: Row, candidate: Candidate, timings: dict[str, timing.Timing], case: Case
    ) -> None:
        own = timings[row.contender]
        row.median_s = own.median
        row.q20_s, row.q80_s = own.quantile(0.2), own.quantile(0.8)
        row.rounds, row.launch, row.eager_s = len(own.rounds), own.launch, own.eager_s
        row.peak_bytes = timing.peak_bytes(candidate.once, self.device)
        row.input_sets, row.cache_bytes = candidate.sets, candidate.cache_bytes
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
                "rotation": f"{3 * cache_bytes(self.device) / 2**20:.0f} MiB of inputs, or of "
                "caches and states of decode steps, where that takes at most "
                f"{MOST_SETS[self.device.type]} sets",
                "memory": timing.MEMORY_NOTE[self.device.type],
                "conventions": list(CONVENTIONS),
            },
            "anchors": {
                "measured": self.anchors,
                "drift": timing.drift(self.anchors) if self.anchors else 0.0,
            },
            "noise": self.noise,
            "flatness": flatness(self.rows),
            "rows": self.rows,
            "attempts": self.attempts,
        }

    def write(self) -> None:
        """Writes ``speed.json``."""
        write_json(self.path, self.content())


def _status(ours: bool, reason: str) -> str:
    """Ours has failed, but where it offers no such call or the device has too little memory."""
    excuses = (NotImplementedError.__name__, torch.OutOfMemoryError.__name__)
    return FAILED if ours and not reason.startswith(excuses) else MISSING


def _label(job: Job) -> str:
    entry, mode, dtype = job
    return f"{entry.case.name}, {mode}, {dtype}"


def _nobody(job: Job, status: str, reason: str) -> Row:
    """A row for a job that has none of its contenders."""
    (entry, mode, dtype), case = job, job[0].case
    return Row(
        *(case.name, case.function, mode, case.shape, dtype, "every contender", False),
        *(status, reason),
        sweep=entry.sweep,
    )


def _identity(environment: dict[str, Any], name: str) -> Any:
    value = environment[name]
    return value["name"] if isinstance(value, dict) else value
