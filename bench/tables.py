"""The tables of the report, and how numbers are written in them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bench.document import Table
from bench.metrics import BASELINE, MixerSummary, Spread, Summary, head_max, spread
from bench.records import Run, Study

Row = dict[str, Any]
ABSENT = "n/a"  # not recorded, or it makes no sense here


# --- numbers -----------------------------------------------------------------------------------


def number(value: float | None, digits: int | None = None) -> str:
    """``digits`` decimals, or three significant figures; -inf (nothing seen) is ``-``."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-")
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:,.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    """Three significant figures; all of them before the point."""
    size = abs(value)
    if size >= 100 or size == 0:
        return 0
    return min(2 - math.floor(math.log10(size)), 6)


def mean_sd(value: Spread | None, digits: int | None = None) -> str:
    """Mean over the seeds, ± standard deviation where there are several."""
    if value is None:
        return ABSENT
    if value.sd is None or not math.isfinite(value.mean):
        return number(value.mean, digits)
    decimals = _decimals(value.mean) if digits is None else digits
    return f"{number(value.mean, decimals)} ± {number(value.sd, decimals)}"


def duration(seconds: float | None) -> str:
    """Milliseconds, whatever the size: a column compares at a glance."""
    return ABSENT if seconds is None else number(1e3 * seconds)


def mebibytes(size: float | None) -> str:
    return ABSENT if size is None else number(size / 2**20)


def mixer_name(mixer: str, kind: str) -> str:
    """With the kind of the maximum it reports, where that is no softmax logit."""
    return mixer + {"linear_score": " (score)", "mixed": " (both)"}.get(kind, "")


SCORE_NOTE = (
    "(score): the pre-normalisation score of linear attention, another quantity than a softmax "
    "logit; (both): a hybrid, the larger of the two."
)


# --- the study ---------------------------------------------------------------------------------


def cells(summary: Summary, study: Study) -> Table:
    """Mixer x learning rate: what the study is about."""
    final = _final_logits(study)
    seeds = len(study.grid.seeds)
    rows = [
        (
            f"{cell.lr:g}",
            "nan" if cell.status == "nan" else mean_sd(cell.val_loss, 3),
            mean_sd(cell.peak_max_logit),
            mean_sd(final.get((cell.mixer, cell.lr))),
            mean_sd(cell.entropy, 2),
            cell.status if cell.seeds == seeds else f"{cell.status}; {cell.seeds}/{seeds} seeds",
            _verdict(cell.loss_vs_baseline),
            _verdict(cell.logit_vs_baseline),
        )
        for cell in summary.cells
    ]
    columns = (
        "learning rate",
        "val loss (nats/byte)",
        "peak max logit",
        "final max logit",
        "entropy (nats)",
        "status",
        f"loss vs {BASELINE}",
        f"peak vs {BASELINE}",
    )
    note = (
        f"Mean ± sd over {_count(seeds, 'seed')}. Against {BASELINE} at the same learning rate: "
        "≈ where the intervals mean ± sd overlap and nothing can be distinguished; one seed "
        "decides nothing (n/a). Status is the worst of the seeds: degraded is 0.1 nats above the "
        "mixer's best learning rate, diverged 1 nat, or above the loss at initialisation. "
    )
    title = "Every mixer at every learning rate"
    return Table(title, columns, rows, 1, note + SCORE_NOTE, _names(summary))


def _names(summary: Summary) -> list[str]:
    """The mixer of each cell."""
    return [mixer_name(cell.mixer, cell.logit_kind) for cell in summary.cells]


def _verdict(found: str | None) -> str:
    return ABSENT if found is None else {"not distinguishable": "≈"}.get(found, found)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _final_logits(study: Study) -> dict[tuple[str, float], Spread | None]:
    """Largest logit of the last recorded step, over seeds."""
    found: dict[tuple[str, float], list[float | None]] = {}
    for run in study.runs:
        if run.result and run.steps:
            cell = found.setdefault((run.config.mixer, run.config.lr), [])
            cell.append(head_max(run.steps[-1].max_logit))
    return {cell: spread(values) for cell, values in found.items()}


def mixers(summary: Summary) -> Table:
    """One row per mixer over the whole grid."""
    rows = [_mixer_row(row) for row in summary.mixers]
    columns = (
        "mixer",
        "parameters",
        "tokens/s",
        "best val loss (nats/byte)",
        "at learning rate",
        "LR sensitivity (nats/byte)",
        "largest ok learning rate",
        "steps to logit > 100",
        "growth exponents",
        "loss spikes (% of steps)",
        "peak memory (MiB)",
        "telemetry overhead (%)",
    )
    note = (
        "LR sensitivity: mean loss over the grid above the best one, runs that fail counting as "
        "untrained. Growth exponents: slope of log peak over log learning rate, between neighbours "
        "in the grid. Loss spikes: 6 standard deviations above the last 128 steps; n/a where no "
        "run is that long. "
    )
    return Table("Every mixer over the whole grid", columns, rows, 1, note + SCORE_NOTE)


def _mixer_row(row: MixerSummary) -> tuple[str, ...]:
    overhead = row.stats_overhead
    return (
        mixer_name(row.mixer, row.logit_kind),
        f"{row.parameters:,}",
        number(row.tokens_per_s.mean if row.tokens_per_s else None, 0),
        mean_sd(row.best_loss, 3),
        ABSENT if row.best_lr is None else f"{row.best_lr:g}",
        mean_sd(row.lr_sensitivity, 3),
        "none" if row.largest_ok_lr is None else f"{row.largest_ok_lr:g}",
        "never" if row.steps_to_logit_100 is None else str(row.steps_to_logit_100),
        ", ".join(number(slope, 1) for slope in row.growth_exponents) or ABSENT,
        number(row.spike_score_loss.mean if row.spike_score_loss else None, 2),
        mebibytes(row.peak_memory_bytes),
        number(100 * overhead.mean if overhead else None, 1),
    )


def heads(summary: Summary) -> Table:
    """Local and global heads apart, and what the probe of the last step saw."""

    def share(value: Spread | None) -> str:
        return number(None if value is None else 100 * value.mean, 1)

    rows = [
        (
            f"{cell.lr:g}",
            mean_sd(cell.peak_max_logit_local),
            mean_sd(cell.peak_max_logit_global),
            mean_sd(cell.mean_row_max),
            share(cell.first_token_share),
            share(cell.sink_rate),
            number(cell.gate_mean.mean if cell.gate_mean else None, 3),
            mean_sd(cell.max_activation),
        )
        for cell in summary.cells
    ]
    columns = (
        "learning rate",
        "peak, local heads",
        "peak, global heads",
        "mean row max",
        "attention on first token (%)",
        "sink heads (%)",
        "mean gate",
        "peak activation",
    )
    note = (
        "A local head sees fewer pairs, so its maximum is lower by chance alone: read it beside "
        "the mean row max. Sink heads put more than 30 % of their attention on the first token. "
    )
    return Table("Heads and activations", columns, rows, 1, note + SCORE_NOTE, _names(summary))


def unfinished(study: Study) -> Table | None:
    """How far the runs without a result have come."""
    rows = [
        (
            run.config.mixer,
            f"{run.config.lr:g}",
            str(run.config.seed),
            *_progress(run),
        )
        for run in study.runs
        if run.result is None
    ]
    columns = ("mixer", "learning rate", "seed", "last step", "its loss (nats/byte)", "max logit")
    title = "Runs that were started and not finished"
    return Table(title, columns, rows) if rows else None


def _progress(run: Run) -> tuple[str, str, str]:
    if not run.steps:
        return (ABSENT,) * 3
    last = run.steps[-1]
    steps = run.config.settings.steps
    return (
        f"{last.step + 1} of {steps}",
        number(last.loss, 3),
        number(head_max(last.max_logit)),
    )


# --- anything ------------------------------------------------------------------------------------


def facts(title: str, entries: Iterable[tuple[str, object]]) -> Table:
    """Name and value; what is not known is said."""
    cells = [(name.replace("_", " "), _fact(value)) for name, value in entries]
    return Table(title, ("what", "value"), cells, 2)


def _fact(value: object) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 100_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100_000 else f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_fact, value))
    return str(value)
