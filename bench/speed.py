"""``python -m bench speed``: the variants beside their peers and the floor of the machine.

Writes ``speed.json`` after every case, so that what is there stays readable: ``environment``,
``protocol``, ``anchors``, ``noise``, ``flatness`` and ``rows``. A row is one contender in one
case, mode and dtype; ``ratio_to`` holds our time over a peer's, so below 1 ours is faster.
What fails ``verify`` is not timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attnvariants._select import FUNCTIONS, IMPLEMENTATIONS
from bench import account, speed_tables
from bench.cases import MODES
from bench.console import make_console
from bench.environment import disturbance, one_line
from bench.errors import BenchError
from bench.floors import CONVENTIONS
from bench.records import write_json
from bench.speed_cases import speed_cases
from bench.speed_rows import FAILED
from bench.speed_session import MOST_DRIFT, Protocol, Session
from bench.verify import DTYPES, pick_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench speed``."""
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, help="default: all")
    parser.add_argument("--modes", "--mode", nargs="+", choices=MODES, help="default: all")
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
    sweep = parser.add_mutually_exclusive_group()
    sweep.add_argument("--only-sweep", action="store_true", help="no cases but the sweep")
    sweep.add_argument("--no-sweep", action="store_true", help="no sweep over the length")
    parser.add_argument("--rounds", type=_length, help="rounds per case (default: 7, quick: 3)")
    parser.add_argument("--quick", action="store_true", help="small shapes, less than a minute")
    parser.add_argument("--tiny", action="store_true", help="shapes that only try the command out")
    parser.add_argument(
        "--resume", action="store_true", help="keep what this commit has timed here already"
    )
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
        for entry in speed_cases(
            device.type, quick=args.quick, lengths=args.lengths, tiny=args.tiny
        )
        if (not args.functions or entry.case.function in args.functions)
        and not (entry.sweep if args.no_sweep else args.only_sweep and not entry.sweep)
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
        rounds=args.rounds or (3 if args.quick or args.tiny else 7),
        budget_s=0.5 if args.quick or args.tiny else 20.0,
        rest_s=2.0 if device.type == "cuda" and not args.quick else 0.0,
    )
    session = Session(device, args.impls, protocol, args.out / "speed.json")
    if args.resume:
        jobs = session.resume(jobs, console)
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
