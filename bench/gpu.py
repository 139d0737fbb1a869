"""``python -m bench gpu``: everything that a GPU is needed for, in one time box.

Each section is a process of its own with a share of the time. At its limit it is interrupted, and
killed where it does not answer; what it has written stays. A later call skips the sections that are
finished and goes on with the others. ``run.json`` says what each section has come to.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import gpu_sections
from bench.console import make_console
from bench.environment import describe, one_line
from bench.errors import BenchError
from bench.gather import RUN_FILE
from bench.gpu_process import CUT_OFF, Outcome, run_process
from bench.gpu_sections import Section
from bench.records import write_json
from bench.speed_session import MOST_DRIFT
from bench.strict_json import read_json
from bench.timing import Anchors, drift

FINISHED, FAULTY, CUT, FAILED, RUNNING = "finished", "found faults", "cut off", "failed", "running"
DONE = (FINISHED, FAULTY)
SHORTEST = 10.0  # seconds that are worth a process
RESULTS = Path("bench/results")

Start = Callable[[Section, Sequence[str], Path, float], Outcome]


@dataclass
class Record:
    """What one section has come to."""

    name: str
    state: str
    seconds: float = 0.0
    limit_s: float = 0.0
    code: int | None = None
    date: str = ""
    commit: str | None = None
    message: str = ""  # the last line that it printed
    command: str = ""
    drift: float = 0.0  # of the anchors in it or around it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench gpu``."""
    parser.add_argument("--minutes", type=float, help="the time box (a dry run needs none)")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=[section.name for section in gpu_sections.sections()],
        metavar="SECTION",
        help="only these: " + ", ".join(section.name for section in gpu_sections.sections()),
    )
    parser.add_argument("--fresh", action="store_true", help="finished sections too, anew")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="every section in small on a CPU, kernels in Triton's interpreter",
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder for results (default: {RESULTS}/ and the device's name)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs what is left; 0 where all of it is finished and nothing failed, else 1.

    Raises:
        BenchError: there is no GPU, or no time box.
    """
    environment = describe()
    if not environment["gpu"] and not args.dry_run:
        raise BenchError("no CUDA device is found; --dry-run tries every section on a CPU")
    if args.minutes is None and not args.dry_run:
        raise BenchError("--minutes says how long the run may take")
    if args.minutes is not None and not args.minutes > 0:
        raise BenchError(f"--minutes must be above 0, got {args.minutes:g}")
    name = environment["gpu"]["name"] if environment["gpu"] and not args.dry_run else "dry-run"
    root = args.out or (Path("runs/dry-run") if args.dry_run else RESULTS / folder_name(name))
    console = make_console()
    console.print(one_line(environment), markup=False, soft_wrap=True)
    seconds = 60 * (args.minutes or 60.0)
    plan = gpu_sections.chosen(args.sections, dry=args.dry_run)
    box = Box(root.resolve(), environment, console, dry=args.dry_run)
    with _terminated_as_interrupted():
        box.run(plan, seconds, fresh=args.fresh)
    return box.summarise(plan)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A polite end from outside also ends the section that runs, and is written down."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def folder_name(device: str) -> str:
    """``"NVIDIA H100 80GB HBM3"`` as ``"nvidia-h100-80gb-hbm3"``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


class Box:
    """One call: the records of the folder, and what is run to complete them."""

    def __init__(
        self,
        root: Path,
        environment: dict[str, Any],
        console: Console,
        *,
        dry: bool,
        start: Start | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root, self.environment, self.console, self.dry = root, environment, console, dry
        self.start, self.now = start or self._process, now
        self.records: dict[str, Record] = {}
        self.marks: list[tuple[str, int]] = []  # section and anchors before it, in this call
        if (root / RUN_FILE).exists():
            found = read_json(root / RUN_FILE)["sections"]
            self.records = {entry["name"]: Record(**entry) for entry in found}

    def run(self, plan: Sequence[Section], seconds: float, *, fresh: bool = False) -> None:
        """Runs the sections that are not finished, each within its share of ``seconds``."""
        end = self.now() + seconds
        todo = [
            section
            for section in plan
            if fresh or section.always or not self._finished(section.name)
        ]
        for section in plan:
            if section not in todo:
                record = self.records[section.name]
                self._say(f"{section.name}: {record.state} on {record.date}, skipped")
        first = self._moments()
        for number, section in enumerate(todo):
            limit = share(todo[number:], end - self.now())
            if limit < SHORTEST:
                self._say(f"{section.name}: no time left")
                continue
            if section.timed:
                self.marks.append((section.name, self._moments() - first))
            self._run_section(section, limit, fresh=fresh)
        self._judge_drift(first)
        self._write()

    def summarise(self, plan: Sequence[Section]) -> int:
        """Says what is finished, what is left, and what to run next."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in ("section", "state", "seconds", "of", "note"):
            table.add_column(name, justify="right" if name in ("seconds", "of") else "left")
        for section in plan:
            record = self.records.get(section.name, Record(section.name, "not started"))
            note = "" if record.state == FINISHED else record.message
            if record.commit and record.commit != self.environment["commit"]:
                note = "; ".join(filter(None, (f"at commit {record.commit[:10]}", note)))
            if record.drift > MOST_DRIFT:
                moved = f"anchors drifted by {100 * record.drift:.0f} %: trust ratios only"
                note = f"{moved}; {note}" if note else moved
            cells = (f"{record.seconds:.0f}", f"{record.limit_s:.0f}", note)
            table.add_row(section.name, record.state, *cells)
        self.console.print(table)
        left = [section.name for section in plan if not self._finished(section.name)]
        faulty = [s.name for s in plan if self.records.get(s.name, _NONE).state == FAULTY]
        if faulty:
            self._say(f"found faults: {', '.join(faulty)}; see output.txt in their folders")
        if left:
            again = f"python -m bench gpu{' --dry-run' if self.dry else ' --minutes M'}"
            self._say(f"left: {', '.join(left)}")
            self._say(f"next: {again} --out {self.root}")
        elif self.dry:
            self._say("every section ran; next: python -m bench gpu --minutes M, on a GPU")
        else:
            self._say("everything is finished; next: python -m bench report --readme README.md")
        return 1 if left or faulty else 0

    # --- one section -----------------------------------------------------------------------------

    def _run_section(self, section: Section, limit: float, *, fresh: bool) -> None:
        folder = self.root / section.name
        if fresh and not section.always:
            _discard(folder)
        command = self._command(section)
        self._say(f"{section.name}: up to {limit:.0f} s, output in {folder / 'output.txt'}")
        record = Record(
            section.name,
            RUNNING,
            limit_s=limit,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            commit=self.environment["commit"],
            command=" ".join(("python -m bench", *command)),
        )
        self.records[section.name] = record
        self._write()
        begun = self.now()
        try:
            while True:
                outcome = self.start(section, command, folder, limit - (self.now() - begun))
                record.code, record.message = outcome.code, outcome.message
                record.state = _state(outcome)
                left = limit - (self.now() - begun)
                if record.state != FAILED or not section.resumes or left < SHORTEST:
                    break
                self._say(f"{section.name}: {outcome.message}; going on behind it")
                if not outcome.progress:
                    break
        except KeyboardInterrupt:
            record.state, record.message = CUT, "interrupted"
            raise
        finally:
            record.seconds = self.now() - begun
            self._write()
        faults = "" if record.state == FINISHED else f": {record.message}"
        self._say(f"{section.name}: {record.state} after {record.seconds:.0f} s{faults}")

    def _command(self, section: Section) -> list[str]:
        names = {
            "root": str(self.root),
            "folder": str(self.root / section.name),
            "jobs": str(min(14, max(2, self.environment["cores"] - 2))),
        }
        parts = section.dry if self.dry else section.command
        return [part.format(**names) for part in parts]

    def _process(
        self, section: Section, command: Sequence[str], folder: Path, limit: float
    ) -> Outcome:
        variables = dict(os.environ)
        variables.pop("TRITON_INTERPRET", None)
        if self.dry and not section.compiles:
            variables["TRITON_INTERPRET"] = "1"
        return run_process([sys.executable, "-m", "bench", *command], folder, limit, variables)

    # --- state -----------------------------------------------------------------------------------

    def _finished(self, name: str) -> bool:
        return name in self.records and self.records[name].state in DONE

    def _moments(self) -> int:
        path = self.root / "anchors.json"
        return len(read_json(path)["measured"]) if path.exists() else 0

    def _judge_drift(self, first: int) -> None:
        """Marks sections by the anchors that they measured, and by those on both sides of them."""
        path = self.root / "anchors.json"
        measured = read_json(path)["measured"][first:] if path.exists() else []
        moments = [Anchors(**entry) for entry in measured]
        for name, before in self.marks:
            around = moments[max(0, before - 1) : before + 1]
            found = [drift(around)] if len(around) == 2 else []
            for file in (self.root / name).glob("*.json"):
                content = read_json(file)
                own = content.get("anchors") if isinstance(content, dict) else None
                found += [own["drift"]] if own else []
            self.records[name].drift = max(found, default=0.0)

    def _write(self) -> None:
        content = {
            "environment": self.environment,
            "dry_run": self.dry,
            "sections": list(self.records.values()),
        }
        write_json(self.root / RUN_FILE, content)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


_NONE = Record("", "")


def share(todo: Sequence[Section], seconds: float) -> float:
    """Seconds for the first of ``todo``: what is kept for it, and its part of what is left over."""
    over = max(0.0, seconds - sum(section.least for section in todo))
    weights = sum(section.weight for section in todo)
    own = over * todo[0].weight / weights if weights else over
    return min(seconds, todo[0].least + (own if todo[0].weight else 0.0))


def _state(outcome: Outcome) -> str:
    """0 is finished; 1 as well, but what it looked at is not as it should be."""
    if outcome.code == CUT_OFF:
        return CUT
    return {0: FINISHED, 1: FAULTY}.get(outcome.code, FAILED)


def _discard(folder: Path) -> None:
    """Removes the results of a section, so that it does not go on behind them."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.suffix in (".json", ".jsonl", ".txt") and path.is_file():
            path.unlink()
