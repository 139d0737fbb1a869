"""Progress as lines in a pipe and as a bar on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from bench import console as bench_console
from bench.console import make_console, progress


def _console(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=80), text


def test_a_pipe_gets_a_line_now_and_then() -> None:
    clock = [0.0]
    console, text = _console(terminal=False)
    with progress(console, 4, now=lambda: clock[0]) as step:
        for name in ("first", "second", "third", "fourth"):
            step(name)
            clock[0] += 0.6 * bench_console.PLAIN_SECONDS
    assert text.getvalue().splitlines() == ["1/4 first", "3/4 third"]


def test_a_terminal_gets_a_bar() -> None:
    console, text = _console(terminal=True)
    with progress(console, 2) as step:
        step("first [bracketed]")
        step("second")
    assert "second" in text.getvalue()


def test_tables_in_a_pipe_have_a_fixed_width() -> None:
    assert make_console().is_terminal or make_console().width == bench_console.PLAIN_WIDTH
