"""Sentences of the report: what the results show and what they do not, from the data alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bench.metrics import BASELINE, DANGER_LINES, MixerSummary, Summary, compare, logit_kind
from bench.records import Run, Study
from bench.tables import mean_sd, number

Row = dict[str, Any]
ALARM = DANGER_LINES[0]
MOST_DRIFT = 0.03
LOCAL_TEXT = ("stdlib", "torch")  # corpora of source code


def study_findings(study: Study, summary: Summary) -> list[str]:
    """The headlines of the training part."""
    found = [
        _runs(study, summary),
        _lowest_loss(summary),
        *_above_alarm(study),
        _beside_baseline(summary),
        _sensitivity(summary),
    ]
    return [sentence for sentence in found if sentence]


def _runs(study: Study, summary: Summary) -> str:
    text = f"{summary.finished} of {summary.planned} training runs are finished"
    if not summary.finished:
        return f"{text}."
    if summary.finished < summary.planned:
        text += "; everything below speaks of those"
    failed = [cell for cell in summary.cells if cell.status in ("nan", "diverged")]
    if not failed:
        return f"{text}. None ended in NaN, none diverged."
    cells = [f"{_code(cell.mixer)} at {cell.lr:g} ({cell.status})" for cell in failed]
    return (
        f"{text}. In at least one seed, NaN or diverged (1 nat above the mixer's best learning "
        f"rate, or above the untrained loss): {_and(cells)}."
    )


def _lowest_loss(summary: Summary) -> str:
    rows = [(row, row.best_loss) for row in summary.mixers if row.best_loss]
    rows = [(row, loss) for row, loss in rows if loss and math.isfinite(loss.mean)]
    if not rows:
        return ""
    best, lowest = min(rows, key=lambda pair: pair[1].mean)
    text = (
        f"Lowest validation loss: {_code(best.mixer)} with {mean_sd(lowest, 3)} nats per byte "
        f"at learning rate {best.best_lr:g}"
    )
    others = [(row, loss) for row, loss in rows if row is not best]
    if not others:
        return f"{text}; it is the only mixer here."
    if lowest.sd is None:
        return f"{text}. It rests on one seed, so close rivals cannot be told apart."
    close = [
        f"{_code(row.mixer)} ({mean_sd(loss, 3)})"
        for row, loss in others
        if compare(loss, lowest) != "higher"
    ]
    if close:
        return f"{text}. Not distinguishable from it: {_and(close)}."
    return f"{text}; all others are distinguishably higher."


def _above_alarm(study: Study) -> list[str]:
    """Which maxima passed 100, softmax logits and other quantities in sentences of their own."""
    finished = [run for run in study.runs if run.result]
    softmax = [run for run in finished if logit_kind(run) == "softmax_logit"]
    others = [run for run in finished if logit_kind(run) != "softmax_logit"]
    found = []
    above, below = _alarm_clauses(softmax)
    if above:
        found.append(f"Attention logits passed {ALARM:g} in {_and(above)}.")
    if below:
        found.append(f"Attention logits never passed {ALARM:g} in {_and(below)}.")
    above, below = _alarm_clauses(others)
    if above or below:
        found.append(
            "Pre-normalisation scores, another quantity that a norm follows: "
            + "; ".join(f"{clause}" for clause in above + below)
            + "."
        )
    return found


def _alarm_clauses(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    above, below = [], []
    for mixer in dict.fromkeys(run.config.mixer for run in runs):
        peaks = [
            (run.config.lr, run.result.peak_max_logit)
            for run in runs
            if run.config.mixer == mixer and run.result
        ]
        known = [(lr, peak) for lr, peak in peaks if not math.isnan(peak)]
        if not known:
            continue
        largest = number(max(peak for _, peak in known))
        over = [lr for lr, peak in known if peak > ALARM]
        if over:
            above.append(f"{_code(mixer)} from learning rate {min(over):g} on (up to {largest})")
        else:
            below.append(f"{_code(mixer)} (at most {largest})")
    return above, below


def _beside_baseline(summary: Summary) -> str:
    """Peak logits against the baseline at the same learning rate, mixer by mixer."""
    clauses = []
    for mixer in dict.fromkeys(cell.mixer for cell in summary.cells):
        verdicts: dict[str, list[str]] = {}
        for cell in summary.cells:
            if cell.mixer == mixer != BASELINE and cell.logit_vs_baseline:
                verdicts.setdefault(cell.logit_vs_baseline, []).append(f"{cell.lr:g}")
        if verdicts:
            parts = [f"{verdict} at {_and(lrs)}" for verdict, lrs in verdicts.items()]
            clauses.append(f"{_code(mixer)} {', '.join(parts)}")
    if not clauses:
        return ""
    return f"Peak logits next to {_code(BASELINE)} at the same learning rate: {'; '.join(clauses)}."


def _sensitivity(summary: Summary) -> str:
    rows = [(row.lr_sensitivity.mean, row) for row in summary.mixers if row.lr_sensitivity]
    if (
        len(rows) < 2 or summary.finished < summary.planned
    ):  # over unequal grids they do not compare
        return ""
    least = min(rows, key=lambda pair: pair[0])
    most = max(rows, key=lambda pair: pair[0])

    def clause(pair: tuple[float, MixerSummary]) -> str:
        return f"{_code(pair[1].mixer)} ({mean_sd(pair[1].lr_sensitivity, 3)})"

    return (
        f"The learning rate matters least to {clause(least)} and most to {clause(most)}: mean "
        "loss over the grid above the best one, in nats per byte."
    )


# --- correctness and speed -----------------------------------------------------------------------


def verify_finding(rows: Sequence[Row]) -> str:
    failed = sum(not row["ok"] for row in rows)
    if failed:
        return f"{failed} of {len(rows)} comparisons with float64 FAILED."
    return f"All {len(rows)} comparisons with float64 are within their error budget."


def speed_finding(rows: Sequence[Row]) -> str:
    """Each function next to its first peer, training mode where it was timed."""
    clauses = []
    ours = {row["contender"] for row in rows if row["ours"]}
    for function in dict.fromkeys(row["function"] for row in rows):
        own = [
            row
            for row in rows
            if row["function"] == function
            and (row["ours"] and not row["sweep"] and row["ratio_to"].keys() - ours)
        ]
        if own:
            row = next((r for r in own if r["mode"] == "forward+backward"), own[0])
            peers = ((name, r) for name, r in row["ratio_to"].items() if name not in ours)
            peer, ratio = next(peers)
            clauses.append(f"{_code(function)} {ratio['median']:.2f} of {peer}")
    if not clauses:
        return ""
    return (
        "Time over that of a peer, below 1 is faster; with the backward pass where there is one, "
        f"first case of each function: {'; '.join(clauses)}."
    )


# --- caveats -------------------------------------------------------------------------------------


def study_caveats(study: Study, summary: Summary) -> list[str]:
    """What the training part cannot show, with the numbers that say why."""
    settings = study.grid.settings
    tokens = settings.steps * settings.batch * settings.length
    sizes = [row.parameters for row in summary.mixers]
    found = []
    if sizes:
        span = f"{min(sizes):,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}"
        found.append(
            f"The models are tiny ({span} parameters, {settings.layers} layers of width "
            f"{settings.width}) and short-trained ({tokens:,} tokens each, sequences of "
            f"{settings.length}). Nothing here ranks the mixers at another size or length."
        )
    count = len(study.grid.seeds)
    if count == 1:
        found.append("One seed: no difference between two cells can be told from chance.")
    else:
        found.append(f"{count} seeds: the standard deviations are rough estimates themselves.")
    found += [sentence for sentence in _computed_caveats(study, summary) if sentence]
    if study.grid.corpus.name in LOCAL_TEXT:
        found.append(
            "The text is source code, which is strongly local: that favours local heads and "
            "decays. Prose may rank the mixers differently."
        )
    return found


def _computed_caveats(study: Study, summary: Summary) -> Iterable[str]:
    rates = study.grid.learning_rates
    edge = [row.mixer for row in summary.mixers if row.best_lr in (min(rates), max(rates))]
    if edge and len(rates) > 1:
        yield (
            f"The best learning rate of {_and([_code(mixer) for mixer in edge])} lies at the edge "
            "of the grid: a better one may lie beyond."
        )
    if summary.mixers and not any(row.spike_score_loss for row in summary.mixers):
        yield "No run is long enough for the spike score: nothing here concerns loss spikes."
    sinks = [cell.sink_rate.mean for cell in summary.cells if cell.sink_rate]
    if sinks and max(sinks) == 0:
        yield (
            "No head put more than 30 % of its attention on the first token: nothing here "
            "concerns attention sinks, which gates are meant to remove."
        )
    if study.grid.settings.schedule == "cosine":
        yield "The learning rate decays, and growth settles with it; a constant one grows on."
    if any(row.logit_kind != "softmax_logit" for row in summary.mixers):
        yield (
            "The scores of linear attention are no softmax logits: a large one does not "
            "saturate anything, because a norm follows."
        )


def speed_caveats(speed: dict[str, Any]) -> list[str]:
    """How far the timings can be trusted."""
    found = []
    noise = speed.get("noise") or []
    if noise:
        low, high = min(entry["low"] for entry in noise), max(entry["high"] for entry in noise)
        found.append(
            f"The same call timed against itself gave ratios from {low:.2f} to {high:.2f}: "
            "smaller differences in time are noise."
        )
    drift = (speed.get("anchors") or {}).get("drift") or 0.0
    if drift > MOST_DRIFT:
        found.append(
            f"The speed of the machine itself changed by {100 * drift:.0f} % while it was "
            "measured: trust ratios more than times."
        )
    return found


def machine_caveats(environments: Sequence[dict[str, Any]]) -> list[str]:
    """What the machine and the checkout limit."""
    found = []
    if any(not environment.get("gpu") for environment in environments):
        found.append("Measured on a CPU: the times say nothing about a GPU.")
    busy = [e for e in environments if (e.get("load_average") or 0) > (e.get("cores") or math.inf)]
    if busy:
        found.append(
            f"The machine was busy (load {busy[0]['load_average']} on {busy[0]['cores']} cores): "
            "trust ratios more than times."
        )
    commits = {environment.get("commit") for environment in environments}
    if len(commits) > 1:
        found.append("The parts were measured at different commits.")
    if any(environment.get("dirty") for environment in environments):
        found.append("The checkout had changes that were not committed.")
    return found


def _code(name: str) -> str:
    return f"`{name}`"


def _and(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
