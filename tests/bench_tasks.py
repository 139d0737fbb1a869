"""Small tasks for worker processes: a module of its own, so that they can import it."""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Any

from bench.errors import BenchError
from bench.logits import run_one


def act(task: Any, report: Any) -> Any:
    """Does what ``task`` says: ``("square", 3)``, ``("raise",)``, ``("kill",)`` and so on."""
    what, *rest = task
    report(what)
    if what == "raise":
        raise RuntimeError("no luck\nsecond line")
    if what == "refuse":
        raise BenchError("the corpus is gone")
    if what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if what == "exit":
        os._exit(3)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(rest[0])
    if what == "pid":
        return os.getpid()
    return rest[0] ** 2 if rest else None


def refuse_seed_1(task: Any, report: Any) -> Any:
    """A real run, except that those of seed 1 crash."""
    if task.config.seed == 1:
        raise RuntimeError("not this one")
    return run_one(task, report)
