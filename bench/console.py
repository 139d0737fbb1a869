"""Tables and progress on the terminal; plain lines where the output is not a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_WIDTH = 132  # of tables in files and pipes
PLAIN_SECONDS = 10.0  # between two lines of progress


def make_console() -> Console:
    """Standard output, with its own width where it is a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


@contextlib.contextmanager
def progress(
    console: Console, total: int, now: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """Yields ``step(what)``, to be called before each of ``total`` pieces of work."""
    if not console.is_terminal:
        yield _plain(console, total, now)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        started = False

        def step(what: str) -> None:
            nonlocal started
            bar.update(task, description=what, advance=1 if started else 0)
            started = True

        yield step


def _plain(console: Console, total: int, now: Callable[[], float]) -> Callable[[str], None]:
    """A line for the first piece of work, and then one every few seconds."""
    done = 0
    printed = -PLAIN_SECONDS

    def step(what: str) -> None:
        nonlocal done, printed
        done += 1
        if now() - printed >= PLAIN_SECONDS or done == 1:
            console.print(f"{done}/{total} {what}", markup=False)
            printed = now()

    return step
