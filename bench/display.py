"""What the logit-growth study shows on a terminal: what runs, how far it is, and the outcome."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import JustifyMethod
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from bench.console import make_console
from bench.environment import one_line
from bench.metrics import BASELINE, Cell, MixerSummary, Summary, logit_kind, summarise
from bench.records import FOLDER, Grid, Result, RunConfig, read_run, read_study, run_path
from bench.tables import mean_sd, mixer_name, number
from bench.workers import Failure


class Estimate:
    """Seconds left, from the time per step that was measured for each mixer."""

    def __init__(self, runs: Sequence[RunConfig], workers: int) -> None:
        self._runs = runs
        self._workers = workers
        self._taken = [0] * len(runs)
        self._first_news: dict[int, tuple[float, int]] = {}  # time, steps taken by then
        self._rough: dict[str, float] = {}  # seconds per step while a mixer's first run lasts
        self._exact: dict[str, float] = {}  # of a whole run, with its evaluations

    def progress(self, index: int, steps: int, now: float) -> None:
        """Run ``index`` has taken ``steps`` steps at the time ``now``."""
        self._taken[index] = steps
        start, before = self._first_news.setdefault(index, (now, steps))
        if steps > before:
            self._rough[self._runs[index].mixer] = (now - start) / (steps - before)

    def finished(self, index: int, result: Result | None) -> None:
        """Run ``index`` is over, with a result or without."""
        if result is not None and result.steps_done:
            self._exact[self._runs[index].mixer] = result.wall_seconds / result.steps_done
        self._taken[index] = self._runs[index].settings.steps

    def steps_taken(self) -> int:
        """Of all runs together; a run that has ended early counts in full."""
        return sum(self._taken)

    def remaining(self) -> float | None:
        """Seconds until the last run is over; ``None`` before anything is known."""
        known = self._rough | self._exact
        if not known:
            return None
        other = statistics.fmean(known.values())
        seconds = [
            (run.settings.steps - taken) * known.get(run.mixer, other)
            for run, taken in zip(self._runs, self._taken, strict=True)
        ]
        return max(sum(seconds) / self._workers, max(seconds))


class Display:
    """One bar for the study with the finished runs above it; plain lines without a terminal."""

    def __init__(self, grid: Grid, runs: Sequence[RunConfig], workers: int, out: Path) -> None:
        self._grid, self._runs, self._workers, self._out = grid, runs, workers, out
        self._over = 0
        self._estimate = Estimate(runs, workers)
        self._console = make_console()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.fields[over]} of {task.fields[runs]} runs, {task.fields[left]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        steps = sum(run.settings.steps for run in runs)
        self._task = self._bar.add_task("", total=steps, over=0, runs=len(runs), left="starting")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def introduce(self, notes: Sequence[str]) -> None:
        """What will run, on which text and machine."""
        grid, settings, corpus = self._grid, self._grid.settings, self._grid.corpus
        done = len(grid.runs) - len(self._runs)
        for line in (
            one_line(grid.environment),
            f"text: {corpus.path}, {corpus.bytes:,} bytes, sha256 {corpus.sha256[:12]}",
            f"models: {settings.layers} layers, width {settings.width}, {settings.heads} heads, "
            f"{settings.batch} x {settings.length} bytes per step, {settings.steps} steps, "
            f"{settings.dtype} on {settings.device}",
            f"grid: {', '.join(grid.mixers)}; learning rates "
            f"{', '.join(f'{lr:g}' for lr in grid.learning_rates)}; "
            f"seeds {', '.join(map(str, grid.seeds))}",
            *(f"note: {note}" for note in notes),
            f"{len(self._runs)} runs, {self._workers} at a time"
            + (f", {done} finished before" if done else ""),
        ):
            self._print(line)

    def progress(self, index: int, steps: int) -> None:
        """News of a run under way."""
        self._estimate.progress(index, steps, time.monotonic())
        self._refresh()

    def finished(self, index: int, result: Result) -> None:
        """A run has its result."""
        kind = _kind(self._out, self._runs[index])
        self._over_with(
            index,
            result,
            f"loss {number(result.val_loss, 3)}, "
            f"{kind} {number(result.peak_max_logit)}, {result.cpu_seconds:.0f} CPU s"
            + (f", NaN after {result.steps_done} steps" if result.status == "nan" else ""),
        )

    def failed(self, index: int, failure: Failure) -> None:
        """A run has ended without a result."""
        self._over_with(index, None, f"failed: {failure.message}")
        if failure.details:
            path = run_path(self._out, self._runs[index].key).with_suffix(".error.txt")
            path.write_text(failure.details, encoding="utf-8")
            self._print(f"  details in {path}")

    def summarise(self) -> None:
        """The tables of all runs in the folder, those of earlier calls too."""
        summary = summarise(read_study(self._out))
        if not summary.cells:
            return
        for table in (_cells(summary.cells), _mixers(summary)):
            self._console.print(table)
        self._print(
            "(score): pre-normalisation score of linear attention, another quantity than a softmax "
            f"logit. vs {BASELINE}: mean ± sd over seeds; overlapping intervals (~) are "
            "not distinguishable."
        )
        self._print(f"{summary.finished} of {summary.planned} runs in {self._out / FOLDER}")

    def _over_with(self, index: int, result: Result | None, outcome: str) -> None:
        self._over += 1
        self._estimate.finished(index, result)
        self._refresh()
        run = self._runs[index]
        left = "" if self._console.is_terminal else f"; {self._left()}"
        self._print(
            f"{self._over:3}/{len(self._runs)}  {run.mixer}  lr {run.lr:g}  seed {run.seed}: "
            f"{outcome}{left}"
        )

    def _refresh(self) -> None:
        taken = self._estimate.steps_taken()
        self._bar.update(self._task, completed=taken, over=self._over, left=self._left())

    def _left(self) -> str:
        seconds = self._estimate.remaining()
        if seconds is None:
            return "measuring"
        minutes = round(seconds / 60)
        return f"{minutes} min left" if seconds >= 90 else f"{seconds:.0f} s left"

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def _kind(out: Path, run: RunConfig) -> str:
    written = read_run(run_path(out, run.key))
    softmax = written is not None and logit_kind(written) == "softmax_logit"
    return "max logit" if softmax else "max score"


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        justify: JustifyMethod = "left" if heading == "mixer" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    return table


def _cells(cells: Sequence[Cell]) -> Table:
    headings = ["mixer", "LR", "val loss", "peak\nmax logit", "local /\nglobal", "entropy"]
    headings += ["max\nact.", "status", f"loss vs\n{BASELINE}", f"peak vs\n{BASELINE}"]
    table = _table("Loss and peak logits, mean ± sd over seeds", headings)
    for before, cell in zip([None, *cells], cells, strict=False):
        if before and before.mixer != cell.mixer:
            table.add_section()
        table.add_row(
            mixer_name(cell.mixer, cell.logit_kind),
            f"{cell.lr:g}",
            mean_sd(cell.val_loss, 3),
            mean_sd(cell.peak_max_logit),
            _local_and_global(cell),
            number(cell.entropy.mean, 2) if cell.entropy else "",
            number(cell.max_activation.mean if cell.max_activation else None),
            cell.status,
            _verdict(cell.loss_vs_baseline),
            _verdict(cell.logit_vs_baseline),
        )
    return table


def _local_and_global(cell: Cell) -> str:
    local, other = cell.peak_max_logit_local, cell.peak_max_logit_global
    return f"{number(local.mean)} / {number(other.mean)}" if local and other else ""


def _verdict(comparison: str | None) -> str:
    return {None: "", "not distinguishable": "~"}.get(comparison, comparison or "")


def _mixers(summary: Summary) -> Table:
    headings = ["mixer", "parameters", "best loss", "at LR", "LR\nsensitivity"]
    headings += ["growth\nexponents", "logit > 100\nat step", "tokens/s", "CPU s\nper run"]
    table = _table("Over the whole grid", headings)
    for row in summary.mixers:
        table.add_row(*_mixer_row(row))
    return table


def _mixer_row(row: MixerSummary) -> tuple[str, ...]:
    reached = row.steps_to_logit_100
    return (
        mixer_name(row.mixer, row.logit_kind),
        f"{row.parameters:,}",
        mean_sd(row.best_loss, 3),
        "" if row.best_lr is None else f"{row.best_lr:g}",
        mean_sd(row.lr_sensitivity, 3),
        ", ".join(number(slope, 1) for slope in row.growth_exponents),
        "never" if reached is None else str(reached),
        number(row.tokens_per_s.mean if row.tokens_per_s else None, 0),
        number(row.cpu_seconds.mean if row.cpu_seconds else None, 1),
    )
