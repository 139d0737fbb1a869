"""A section of ``python -m bench gpu`` as a process that is over at its limit, one way or other."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OUTPUT = "output.txt"
CUT_OFF = -1000  # no exit code: the limit came first
GRACE = 15.0  # seconds to write what there is, before the process is killed
_LIBC = ctypes.CDLL(None)  # loaded before any process is forked
_PR_SET_PDEATHSIG = 1
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Outcome:
    """How a process ended; ``progress``: it has written results before that."""

    code: int
    message: str  # the last line that it printed
    progress: bool = True


def run_process(
    command: Sequence[str], folder: Path, limit: float, variables: Mapping[str, str]
) -> Outcome:
    """Runs a command in the checkout, with its output in ``folder``.

    ``limit`` includes the grace in which an interrupted process may end by itself. The process and
    all that it starts are one group, so that nothing of it stays on the device.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = _results(folder)
    with (folder / OUTPUT).open("a", encoding="utf-8") as output:
        output.write(f"\n$ {' '.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**variables, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        grace = min(GRACE, limit / 4)
        try:
            code = process.wait(limit - grace)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            code = CUT_OFF
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()
    return Outcome(code, last_line(folder / OUTPUT), _results(folder) != before)


def _end_with_parent() -> None:
    """Linux kills this process when the one that started it is gone, however that ended."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def last_line(path: Path) -> str:
    """The last line of a file that says how a command went."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("written: ")]
    return lines[-1] if lines else ""


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the whole group, of which something may be left when its first process is over."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _results(folder: Path) -> dict[Path, int]:
    """When each result was last written."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.suffix in (".json", ".jsonl")
    }
