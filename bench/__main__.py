"""``python -m bench``: verify, time, train and report; without arguments all four, in minutes."""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from bench.errors import BenchError

USER_ERROR = 2  # exit code of everything that the user can mend

COMMANDS = {
    "verify": "compare every usable implementation with float64",
    "speed": "time the implementations beside their peers and the floor",
    "compile": "compile the Triton kernels for every chip, without a GPU",
    "anchors": "measure how fast this machine copies and multiplies",
    "replay": "compare CUDA graphs and side streams with plain calls",
    "sanitize": "watch every kernel with compute-sanitizer",
    "tune": "find tile sizes for one kernel: prune without a GPU, time on one",
    "gpu": "all that takes a GPU, in one time box; resumes; --dry-run on a CPU",
    "logits": "train small language models and record how their logits grow",
    "report": "tables, plots and one HTML page from the results in a folder",
}


def parser() -> argparse.ArgumentParser:
    """The command line, with one subcommand per part of the benchmark."""
    root = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmark of attnvariants. Without a command: verify, a quick speed run, "
        "the smoke preset of the logit study and the report, in less than ten minutes.",
    )
    root.add_argument("--out", type=Path, help="folder for the results of a run without a command")
    commands = root.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        importlib.import_module(f"bench.{name}").add_arguments(command)
    return root


def run(arguments: Sequence[str]) -> int:
    """Runs one command, or all of them; returns the exit code."""
    commands = parser()
    args = commands.parse_args(arguments)
    if args.command:
        return int(importlib.import_module(f"bench.{args.command}").run(args))
    return run_all(commands, args.out or _fresh_folder())


def run_all(commands: argparse.ArgumentParser, out: Path) -> int:
    """The main job: everything in a few minutes, ending with the page to look at."""
    stages = (
        ["verify", "--quick", "--out", str(out)],
        ["speed", "--quick", "--out", str(out)],
        ["logits", "--preset", "smoke", "--resume", "--out", str(out)],
        ["report", str(out)],
    )
    worst = 0
    for number, stage in enumerate(stages, 1):
        print(f"\n[{number}/{len(stages)}] {COMMANDS[stage[0]]}\n", flush=True)
        args = commands.parse_args(stage)
        worst = max(worst, int(importlib.import_module(f"bench.{stage[0]}").run(args)))
    print(f"\nOpen {out / 'report.html'} in a browser.")
    return worst


def _fresh_folder() -> Path:
    return Path("runs") / datetime.now(timezone.utc).strftime("%Y-%m-%d_%H-%M-%S")


def main() -> int:
    """Entry point: turns everything that the user can mend into one line and exit code 2."""
    try:
        return run(sys.argv[1:])
    except BenchError as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; the results so far are kept, and --resume continues a study"
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "matplotlib", "numpy"):
            raise
        message = f'{error.name} is not installed; pip install -c constraints.txt -e ".[bench]"'
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        message = f"cannot write results: {error}"
    print(f"bench: {message}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
