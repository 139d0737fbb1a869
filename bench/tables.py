"""The tables of the report, and how numbers are written in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.document import Table
from bench.metrics import BASELINE, Cell, MixerSummary, Spread, Summary, head_max, spread
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
            mixer_name(cell.mixer, cell.logit_kind),
            f"{cell.lr:g}",
            mean_sd(cell.val_loss, 3),
            mean_sd(cell.peak_max_logit),
            mean_sd(final.get((cell.mixer, cell.lr))),
            mean_sd(cell.entropy, 2),
            cell.status
            if cell.seeds == seeds
            else f"{cell.status} ({cell.seeds} of {seeds} seeds)",
            cell.loss_vs_baseline or ABSENT,
            cell.logit_vs_baseline or ABSENT,
        )
        for cell in summary.cells
    ]
    columns = (
        "mixer",
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
        "intervals mean ± sd that overlap are not distinguishable, and one seed decides nothing (n/a). Status is the "
        "worst of the seeds: degraded is 0.1 nats above the mixer's best run, diverged 1 nat, or "
        "above the loss at initialisation. "
    )
    return Table("Every mixer at every learning rate", columns, rows, 1, note + SCORE_NOTE)


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
        "first step with logit > 100",
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
            mixer_name(cell.mixer, cell.logit_kind),
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
        "mixer",
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
    return Table("Heads and activations", columns, rows, 1, note + SCORE_NOTE)


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


# --- speed -------------------------------------------------------------------------------------


def speed(rows: Sequence[Row], function: str) -> Table | None:
    """All contenders of one function, apart from the sweep over the length."""
    own = [r for r in rows if r["function"] == function and not r["sweep"] and r["status"] == "ok"]
    cells = [
        (
            row["case"],
            row["mode"],
            row["contender"] + (" (ours)" if row["ours"] else ""),
            duration(row["median_s"]),
            f"{duration(row['q20_s'])} to {duration(row['q80_s'])}",
            number(row["tokens_per_s"]),
            number(row["tflops"], 3),
            number(row["gbytes_per_s"]),
            mebibytes(row["peak_bytes"]),
            number(row["percent_of_floor"], 0),
            "; ".join(_ratio(peer, ratio) for peer, ratio in row["ratio_to"].items()) or ABSENT,
        )
        for row in own
    ]
    columns = (
        "case",
        "mode",
        "contender",
        "time (ms)",
        "20 to 80 % (ms)",
        "tokens/s",
        "TFLOP/s",
        "GB/s",
        "peak memory (MiB)",
        "% of floor",
        "time / time of peer",
    )
    title = f"Speed of {function}"
    if own:
        title += f" ({', '.join(dict.fromkeys(row['dtype'] for row in own))})"
    return Table(title, columns, cells, 3) if own else None


def _ratio(peer: str, ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} of {peer} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def sweep(rows: Sequence[Row]) -> Table | None:
    """Microseconds per token, one row per length."""
    timed = [row for row in rows if row["sweep"] and row["status"] == "ok"]
    names = list(dict.fromkeys(_contender(row) for row in timed))
    keys = list(dict.fromkeys((row["mode"], row["shape"]["T"]) for row in timed))
    found = {(row["mode"], row["shape"]["T"], _contender(row)): row for row in timed}

    def per_token(row: Row | None) -> str:
        if row is None:
            return ABSENT
        return number(1e6 * row["median_s"] / (row["shape"]["B"] * row["shape"]["T"]))

    cells = [
        (mode, str(length), *(per_token(found.get((mode, length, name))) for name in names))
        for mode, length in sorted(keys)
    ]
    title = "Time per token over the length (microseconds)"
    return Table(title, ("mode", "length", *names), cells, 1) if cells else None


def _contender(row: Row) -> str:
    return f"{row['function']}, {row['contender']}" if row["ours"] else str(row["contender"])


def not_timed(rows: Sequence[Row]) -> Table | None:
    """What was not timed, and why: a missing peer is said, not left out."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["contender"], row["status"], row["reason"] or ABSENT)
            reasons.setdefault(key, []).append(row["function"])
    cells = [
        (name, status, ", ".join(dict.fromkeys(functions)), reason)
        for (name, status, reason), functions in reasons.items()
    ]
    columns = ("contender", "status", "function", "reason")
    return Table("Not timed", columns, cells, 4) if cells else None


# --- correctness -------------------------------------------------------------------------------


def verify_summary(rows: Iterable[Row]) -> Table:
    """Function x implementation x dtype with the worst comparison of each."""
    groups = _grouped(rows, lambda row: (row["function"], row["impl"], row["dtype"]))
    cells = []
    for key, group in groups.items():
        worst = max(group, key=lambda row: _severity(row))
        failed = sum(not row["ok"] for row in group)
        cells.append(
            (
                *key,
                str(len(group)),
                str(failed),
                number(_severity(worst), 2),
                f"{worst['name']}, {worst['case']}",
            )
        )
    columns = (
        "function",
        "implementation",
        "dtype",
        "comparisons",
        "failed",
        "worst error / budget",
        "worst comparison",
    )
    note = (
        "Against float64. The budget is twice the error of the definition computed in the same "
        "precision, plus one rounding; up to 1 is within it."
    )
    return Table("Comparisons with float64", columns, cells, 3, note)


def _severity(row: Row) -> float:
    error, budget = row["error"], row["budget"]
    if math.isnan(error):
        return math.inf
    if budget == 0:
        return 0.0 if error == 0 else math.inf
    return float(error / budget)


def verify_failures(rows: Iterable[Row]) -> Table | None:
    """Every comparison over its budget."""
    cells = [
        (
            row["function"],
            row["impl"],
            row["dtype"],
            row["case"],
            row["name"],
            row.get("reason") or "",
            f"{row['error']:.2e}",
            f"{row['budget']:.2e}",
        )
        for row in rows
        if not row["ok"]
    ]
    columns = ("function", "implementation", "dtype", "case", "what", "reason", "error", "budget")
    return Table("Failed comparisons", columns, cells, 6) if cells else None


def not_verified(rows: Iterable[Row]) -> Table | None:
    """What verify left out, and why."""
    groups = _grouped(rows, lambda row: (row["impl"], row["reason"]))
    cells = [
        (impl, ", ".join(dict.fromkeys(row["function"] for row in group)), reason)
        for (impl, reason), group in groups.items()
    ]
    columns = ("implementation", "function", "reason")
    return Table("Not verified", columns, cells, 3) if cells else None


def _grouped(
    rows: Iterable[Row], key: Callable[[Row], tuple[str, ...]]
) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def facts(title: str, entries: Iterable[tuple[str, object]]) -> Table:
    """Name and value; what is not known is said."""
    cells = [(name, ABSENT if value is None else str(value)) for name, value in entries]
    return Table(title, ("what", "value"), cells, 2)


def cell_of(summary: Summary, mixer: str, lr: float) -> Cell | None:
    """The cell of one mixer at one learning rate."""
    return next((c for c in summary.cells if c.mixer == mixer and c.lr == lr), None)
