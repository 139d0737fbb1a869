"""What the logit-growth study says in numbers: definitions of the field, and summaries of a grid.

Series are plain lists of floats; where a definition differs between papers, both are here under
their own names.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.records import PerHead, Run, Study

DANGER_LINES = (1e2, 1e3, 1e4)  # max logits at which training has been seen to suffer
DEGRADED_MARGIN = 0.1  # nats above the mixer's best learning rate
DIVERGED_MARGIN = 1.0
SINK_SHARE = 0.3  # mean attention on the first token above which a head is a sink
STATUSES = ("ok", "degraded", "diverged", "nan")  # from best to worst
BASELINE = "mhsa"


# --- one series --------------------------------------------------------------------------------


def lr_sensitivity(losses: Sequence[float], initial_loss: float) -> float:
    """Mean loss above the best one over a log-spaced grid of learning rates (Wortsman et al.).

    ``mean(min(loss(lr), initial_loss)) - best``; NaN and runs above it count as ``initial_loss``.
    """
    capped = [initial_loss if math.isnan(loss) else min(loss, initial_loss) for loss in losses]
    return statistics.fmean(capped) - min(capped)


def spike_score_olmo2(
    series: Sequence[float], window: int = 1000, deviations: float = 7.0
) -> float | None:
    """Share of values at least 7 standard deviations from the mean of the last 1000, in %.

    Two-sided, as in the OLMo 2 paper. ``None`` where the window never fills.
    """
    return _spike_share(_spikes(series, window, deviations, two_sided=True))


def spike_score_olmo_core(
    series: Sequence[float],
    window: int = 128,
    deviations: float = 6.0,
    recent: int | None = None,
) -> float | None:
    """Share of values more than 6 standard deviations above the mean of the last 128, in %.

    One-sided, as in OLMo-core; ``recent`` restricts the share to that many last values (10 000
    there), otherwise it is the cumulative rate. ``None`` where the window never fills.
    """
    verdicts = _spikes(series, window, deviations, two_sided=False)
    return _spike_share(verdicts if recent is None else verdicts[-recent:])


def _spikes(
    series: Sequence[float], window: int, deviations: float, *, two_sided: bool
) -> list[bool | None]:
    """Per value: is it a spike against the ``window`` values before it; ``None`` = no verdict."""
    verdicts: list[bool | None] = []
    for index, value in enumerate(series):
        past = series[max(0, index - window) : index]
        if len(past) < window or not all(math.isfinite(p) for p in past):
            verdicts.append(None)
            continue
        mean = statistics.fmean(past)
        deviation = statistics.pstdev(past, mean)
        distance = abs(value - mean) if two_sided else value - mean
        if deviation < 1e-10:
            verdicts.append(False)
        elif two_sided:
            verdicts.append(not distance < deviations * deviation)  # NaN counts as a spike
        else:
            verdicts.append(not distance <= deviations * deviation)
    return verdicts


def _spike_share(verdicts: Sequence[bool | None]) -> float | None:
    judged = [verdict for verdict in verdicts if verdict is not None]
    return 100 * sum(judged) / len(judged) if judged else None


def growth_exponents(lrs: Sequence[float], peaks: Sequence[float]) -> list[float]:
    """Slopes of log(peak max logit) over log(learning rate) between neighbours in the grid."""
    points = list(zip(lrs, peaks, strict=True))
    return [
        math.log(high / low) / math.log(lr_high / lr_low) if min(low, high) > 0 else math.nan
        for (lr_low, low), (lr_high, high) in itertools.pairwise(points)
    ]


def first_step_above(steps: Iterable[tuple[int, float]], threshold: float) -> int | None:
    """The first step whose value is above ``threshold``."""
    return next((step for step, value in steps if value > threshold), None)


def entropy_floor(centred_norm: float, length: int) -> float:
    """Least entropy of a softmax row of ``length`` whose centred logits have this 2-norm.

    Attained by one logit against ``length - 1`` equal ones at a distance
    ``delta = norm * sqrt(length / (length - 1))``.
    """
    if length < 2:
        return 0.0
    delta = centred_norm * math.sqrt(length / (length - 1))
    rest = (length - 1) * math.exp(-delta)
    return math.log1p(rest) + delta * rest / (1 + rest)


def attention_entropy(attention: Tensor) -> Tensor:
    """``-sum_j A_ij ln A_ij`` of each row of attention probabilities ``[..., T, S]``, in nats."""
    return torch.special.entr(attention).sum(-1)


def sink_rate(first_token_share: PerHead, threshold: float = SINK_SHARE) -> float | None:
    """Share of heads whose mean attention on the first token exceeds ``threshold``."""
    shares = [share for layer in first_token_share if layer for share in layer]
    return sum(share > threshold for share in shares) / len(shares) if shares else None


def is_massive(largest: float, median: float) -> bool:
    """Massive activation: above 100 and above 1000 times the median (Sun et al.)."""
    return largest > 100 and largest > 1000 * median


def depth_growth(first: float, last: float, layers: int) -> float:
    """``ln(last / first) / layers``: exponential growth of a norm over depth (OLMo 2)."""
    return math.log(last / first) / layers


def status(run: Run, best: float) -> str:
    """``nan``, ``diverged``, ``degraded`` or ``ok``, next to the ``best`` loss of the mixer.

    The best is the mean over seeds at the mixer's best learning rate. Diverged: above the loss at
    initialisation, or 1 nat above the best; degraded: 0.1 above it.
    """
    result = run.result
    if result is None:
        return "unfinished"
    loss = result.val_loss
    if result.status == "nan" or math.isnan(loss):
        return "nan"
    if loss > result.initial_loss or loss > best + DIVERGED_MARGIN:
        return "diverged"
    return "degraded" if loss > best + DEGRADED_MARGIN else "ok"


def head_mean(
    values: PerHead, groups: Sequence[Sequence[str]] | None = None, group: str | None = None
) -> float | None:
    """Mean over layers and heads, or over the heads of one ``group`` ("local" or "global")."""
    return _fold(statistics.fmean, values, groups, group)


def head_max(
    values: PerHead, groups: Sequence[Sequence[str]] | None = None, group: str | None = None
) -> float | None:
    """Maximum over layers and heads, or over the heads of one ``group``; NaN is passed over."""
    return _fold(max, values, groups, group)


def _fold(
    fold: Callable[[list[float]], float],
    values: PerHead,
    groups: Sequence[Sequence[str]] | None,
    group: str | None,
) -> float | None:
    chosen = [
        value
        for layer, heads in enumerate(values)
        if heads is not None
        for head, value in enumerate(heads)
        if not math.isnan(value)
        and (group is None or (groups is not None and groups[layer][head] == group))
    ]
    return fold(chosen) if chosen else None


# --- a whole grid ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; ``sd`` is ``None`` for a single one."""

    mean: float
    sd: float | None
    n: int

    def __str__(self) -> str:
        digits = 3 if abs(self.mean) < 10 else (1 if abs(self.mean) < 1000 else 0)
        text = f"{self.mean:.{digits}f}"
        return text if self.sd is None else f"{text} ± {self.sd:.{digits}f}"


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and sd of the values that are numbers; ``None`` where there are none.

    An infinite value makes the mean infinite and leaves no standard deviation.
    """
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    if not numbers:
        return None
    mean = statistics.fmean(numbers)
    known = len(numbers) > 1 and math.isfinite(mean)
    return Spread(mean, statistics.stdev(numbers) if known else None, len(numbers))


def compare(value: Spread | None, baseline: Spread | None) -> str | None:
    """``"lower"``, ``"higher"`` or ``"not distinguishable"``: intervals mean ± sd overlap.

    ``None`` where one side is missing or rests on a single seed.
    """
    if value is None or baseline is None or value.sd is None or baseline.sd is None:
        return None
    if value.mean + value.sd < baseline.mean - baseline.sd:
        return "lower"
    if value.mean - value.sd > baseline.mean + baseline.sd:
        return "higher"
    return "not distinguishable"


@dataclass(frozen=True)
class Cell:
    """All seeds of one mixer at one learning rate. Statistics of heads are from the last probe."""

    mixer: str
    lr: float
    seeds: int  # finished runs
    status: str  # the worst of the seeds
    logit_kind: str  # "softmax_logit", "linear_score" or "mixed": never on one axis unlabelled
    val_loss: Spread | None
    peak_max_logit: Spread | None
    peak_max_logit_local: Spread | None
    peak_max_logit_global: Spread | None
    mean_row_max: Spread | None
    entropy: Spread | None
    first_token_share: Spread | None
    sink_rate: Spread | None
    gate_mean: Spread | None
    max_activation: Spread | None
    steps_to_logit_100: Spread | None  # over the seeds that get there
    loss_vs_baseline: str | None  # see ``compare``; the baseline is mhsa at the same rate
    logit_vs_baseline: str | None  # only between equal kinds


@dataclass(frozen=True)
class MixerSummary:
    """One mixer over the whole grid."""

    mixer: str
    logit_kind: str
    parameters: int
    best_loss: Spread | None
    best_lr: float | None
    lr_sensitivity: Spread | None  # over seeds
    largest_ok_lr: float | None  # of the rates at which every seed is "ok"
    growth_exponents: list[float]  # between neighbouring learning rates
    steps_to_logit_100: int | None  # the earliest of its runs
    spike_score_loss: Spread | None
    tokens_per_s: Spread | None
    cpu_seconds: Spread | None
    peak_memory_bytes: int | None
    stats_overhead: Spread | None


@dataclass(frozen=True)
class Summary:
    """What ``summarise`` makes of a study, in the grid's order."""

    cells: list[Cell]
    mixers: list[MixerSummary]
    finished: int
    planned: int


def summarise(study: Study) -> Summary:
    """Rows for tables and plots from the finished runs of ``study``."""
    finished = [run for run in study.runs if run.result is not None]
    mixers = [m for m in study.grid.mixers if any(run.config.mixer == m for run in finished)]
    cells: list[Cell] = []
    summaries: list[MixerSummary] = []
    for mixer in sorted(mixers, key=lambda m: m != BASELINE):  # the baseline first
        runs = [run for run in finished if run.config.mixer == mixer]
        own = _cells(runs, [cell for cell in cells if cell.mixer == BASELINE])
        cells += own
        summaries.append(_summary(runs, own))
    order = mixers.index
    return Summary(
        sorted(cells, key=lambda cell: (order(cell.mixer), cell.lr)),
        sorted(summaries, key=lambda summary: order(summary.mixer)),
        len(finished),
        len(study.grid.runs),
    )


def _cells(runs: list[Run], baseline: list[Cell]) -> list[Cell]:
    by_lr: dict[float, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.config.lr):
        by_lr.setdefault(run.config.lr, []).append(run)
    losses = [_losses(same) for same in by_lr.values()]
    best = min((loss.mean for loss in losses if loss), default=math.inf)
    return [
        _cell(same, best, next((c for c in baseline if c.lr == lr), None))
        for lr, same in by_lr.items()
    ]


def _losses(runs: list[Run]) -> Spread | None:
    return spread(r.val_loss for run in runs if (r := run.result) and r.status != "nan")


def _cell(runs: list[Run], best: float, baseline: Cell | None) -> Cell:
    results = [run.result for run in runs if run.result is not None]
    last = [(run.probes[-1], run.header.head_groups) for run in runs if run.probes]
    kind = logit_kind(runs[0])
    val_loss = _losses(runs)
    peak = spread(r.peak_max_logit for r in results)
    alike = baseline is not None and baseline.logit_kind == kind

    def heads(name: str) -> Spread | None:
        return spread(head_mean(getattr(probe, name)) for probe, _ in last)

    return Cell(
        mixer=runs[0].config.mixer,
        lr=runs[0].config.lr,
        seeds=len(runs),
        status=max((status(run, best) for run in runs), key=STATUSES.index),
        logit_kind=kind,
        val_loss=val_loss,
        peak_max_logit=peak,
        peak_max_logit_local=spread(r.peak_max_logit_local for r in results),
        peak_max_logit_global=spread(r.peak_max_logit_global for r in results),
        mean_row_max=heads("mean_row_max"),
        entropy=heads("entropy"),
        first_token_share=heads("first_token_share"),
        sink_rate=spread(sink_rate(probe.first_token_share) for probe, _ in last),
        gate_mean=heads("gate_mean"),
        max_activation=spread(r.peak_max_activation for r in results),
        steps_to_logit_100=spread(r.steps_to_logit_100 for r in results),
        loss_vs_baseline=compare(val_loss, baseline.val_loss) if baseline else None,
        logit_vs_baseline=compare(peak, baseline.peak_max_logit) if baseline and alike else None,
    )


def _summary(runs: list[Run], cells: list[Cell]) -> MixerSummary:
    results = [run.result for run in runs if run.result is not None]
    best = min(
        (cell for cell in cells if cell.val_loss),
        key=lambda cell: cell.val_loss.mean if cell.val_loss else math.inf,
        default=None,
    )
    peaks = [(cell.lr, cell.peak_max_logit.mean) for cell in cells if cell.peak_max_logit]
    reached = [r.steps_to_logit_100 for r in results if r.steps_to_logit_100 is not None]
    memory = [r.peak_memory_bytes for r in results if r.peak_memory_bytes is not None]
    return MixerSummary(
        mixer=runs[0].config.mixer,
        logit_kind=cells[0].logit_kind,
        parameters=runs[0].header.parameters,
        best_loss=best.val_loss if best else None,
        best_lr=best.lr if best else None,
        lr_sensitivity=_sensitivity(runs, {cell.lr for cell in cells}),
        largest_ok_lr=max((cell.lr for cell in cells if cell.status == "ok"), default=None),
        growth_exponents=growth_exponents([lr for lr, _ in peaks], [peak for _, peak in peaks]),
        steps_to_logit_100=min(reached, default=None),
        spike_score_loss=spread(r.spike_score_loss for r in results),
        tokens_per_s=spread(r.tokens_per_s for r in results),
        cpu_seconds=spread(r.cpu_seconds for r in results),
        peak_memory_bytes=max(memory, default=None),
        stats_overhead=spread(r.stats_overhead for r in results),
    )


def _sensitivity(runs: list[Run], lrs: set[float]) -> Spread | None:
    """LR sensitivity of each seed that has finished at every rate, over those seeds."""
    values = []
    for seed in {run.config.seed for run in runs}:
        results = [run.result for run in runs if run.config.seed == seed and run.result]
        if len(results) == len(lrs) > 1:
            losses = [r.val_loss if r.status != "nan" else math.nan for r in results]
            values.append(lr_sensitivity(losses, statistics.fmean(r.initial_loss for r in results)))
    return spread(values)


def logit_kind(run: Run) -> str:
    """The kind of maximum a run reports: one of the two, or ``"mixed"`` in a hybrid."""
    kinds = set(run.header.logit_kinds)
    return kinds.pop() if len(kinds) == 1 else "mixed"
