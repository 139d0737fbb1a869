"""Tasks in separate processes: one task per process at a time, one thread each.

Small models train fastest as many single-threaded processes side by side. A process that raises,
or is killed, costs its own task only: it is reported, and the others go on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from bench.errors import BenchError

Report = Callable[[Any], None]


@dataclass(frozen=True)
class Failure:
    """Why a task has no result."""

    message: str  # one line
    details: str = ""  # the traceback
    fatal: bool = False  # it would stop the other tasks as well: bad input, a full disk


@dataclass(frozen=True)
class Message:
    """News of task number ``task``: ``kind`` is "progress", "done" or "failed"."""

    task: int
    kind: str
    value: Any


def run_tasks(
    function: Callable[[Any, Report], Any], tasks: Sequence[Any], workers: int
) -> Iterator[Message]:
    """Calls ``function(task, report)`` for each task in ``workers`` processes, first come first.

    What ``report`` is called with arrives as "progress", the return value as "done", a
    :class:`Failure` as "failed". Closing the iterator, or an interrupt, ends the processes.
    """
    waiting = list(enumerate(tasks))[::-1]
    busy: dict[Connection, tuple[BaseProcess, int]] = {}
    idle: list[tuple[BaseProcess, Connection]] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                process, connection = idle.pop() if idle else _start(function)
                index, task = waiting.pop()
                busy[connection] = process, index
                with contextlib.suppress(OSError):  # a dead process is noticed below
                    connection.send(task)
            for ready in multiprocessing.connection.wait(list(busy)):
                assert isinstance(ready, Connection)
                process, index = busy[ready]
                try:
                    kind, value = ready.recv()
                except (EOFError, OSError):
                    process.join(5)
                    kind, value = "failed", Failure(_ending(process))
                    ready.close()
                if kind != "progress":
                    del busy[ready]
                    if not ready.closed:
                        idle.append((process, ready))
                yield Message(index, kind, value)
    finally:
        _stop([*idle, *((process, connection) for connection, (process, _) in busy.items())])


def _start(function: Callable[[Any, Report], Any]) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")  # fork would break CUDA and thread pools
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function), daemon=True)
    with _interrupts_ignored():  # a new process inherits this: only the parent answers Ctrl-C
        process.start()
    theirs.close()
    return process, ours


def _work(connection: Connection, function: Callable[[Any, Report], Any]) -> None:
    """A worker process: tasks in, messages out, until the parent hangs up."""
    torch.set_num_threads(1)

    def report(value: Any) -> None:
        connection.send(("progress", value))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = connection.recv()
            try:
                answer = "done", function(task, report)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                answer = "failed", _failure(error)
            connection.send(answer)


def _failure(error: Exception) -> Failure:
    message = str(error).strip().split("\n")[0]
    if isinstance(error, BenchError):
        return Failure(message, fatal=True)
    if isinstance(error, OSError):
        return Failure(f"cannot write results: {message}", fatal=True)
    return Failure(f"{type(error).__name__}: {message}", traceback.format_exc())


def _ending(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"the worker process was killed by {signal.Signals(-code).name}"
    return f"the worker process ended with exit code {code}"


def _stop(workers: Sequence[tuple[BaseProcess, Connection]]) -> None:
    for process, connection in workers:
        connection.close()
        process.terminate()
    for process, _ in workers:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
