"""The figures of the logit-growth study.

Each function takes the study, returns a ``Figure`` and raises ``NotDrawn`` with the reason where
its data is missing. Softmax logits are drawn solid; the pre-normalisation scores of linear
attention are another quantity, drawn dashed and named so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from bench import plot_style as style
from bench.metrics import DANGER_LINES, Summary, head_max, logit_kind
from bench.plot_style import MUTED, Look, NotDrawn, compact, fixed_ticks, log_axis
from bench.records import PerHead, Run, Step, Study

FAILED = ("diverged", "nan")
SCORE = "pre-normalisation score"
STATISTICS = {
    "max_logit": "Max logit, whole run",
    "entropy": "Attention entropy (nats), last probe",
    "first_token_share": "Attention on the first token, last probe",
}


# --- loss and logits against the learning rate -------------------------------------------------


def loss_and_logits(study: Study, summary: Summary) -> Figure:
    """The figure that tells the story: loss above peak max logit, over the learning rate."""
    rates = sorted({cell.lr for cell in summary.cells})
    if len(rates) < 2:
        raise NotDrawn("it needs finished runs at two learning rates or more")
    failed = {(cell.mixer, cell.lr) for cell in summary.cells if cell.status in FAILED}
    with style.style():
        figure = style.figure(5.9)
        loss, peak = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.15))
        kinds = _looks(study)
        for mixer, look in kinds.items():
            runs = [run for run in study.runs if run.config.mixer == mixer and run.result]
            _rate_line(loss, runs, look, _val_loss, failed)
            _rate_line(peak, runs, look, _peak, set())
        loss.set_title("Validation loss (nats per byte)")
        loss.set_ylim(*_loss_limits(summary, loss))
        peak.set_title(_logit_title(study, "Peak max logit"))
        lines = _logit_axis([peak])
        fixed_ticks(peak, rates)
        peak.set_xlim(rates[0] / 1.25, rates[-1] * 1.25)
        peak.set_xlabel("learning rate")
        handles = _mixer_handles(study, kinds)
        if failed:
            handles.append(_handle("diverged, NaN", marker="x", linestyle="none", color=MUTED))
        if len(study.grid.seeds) > 1:
            handles.append(Patch(color=MUTED, alpha=0.25, linewidth=0, label="range of seeds"))
        style.legend_below(figure, handles + lines)
    return figure


def _rate_line(
    ax: Axes,
    runs: Sequence[Run],
    look: Look,
    value: Callable[[Run], float | None],
    failed: set[tuple[str, float]],
) -> None:
    """Mean over seeds with their range; what is off the scale is marked on the upper edge."""
    by_rate: dict[float, list[float | None]] = {}
    for run in sorted(runs, key=lambda run: run.config.lr):
        by_rate.setdefault(run.config.lr, []).append(value(run))
        if (run.config.mixer, run.config.lr) in failed:
            by_rate[run.config.lr].append(math.nan)
    points = []
    for rate, values in by_rate.items():
        known = [v for v in values if v is not None]
        numbers = [v for v in known if math.isfinite(v)]
        if len(numbers) < len(known):
            style.mark_on_top(ax, rate, look)
        elif numbers:
            points.append((rate, statistics.fmean(numbers), min(numbers), max(numbers)))
    if points:
        rates, means, lows, highs = zip(*points, strict=True)
        ax.plot(rates, means, color=look.color, marker=look.marker, linestyle=look.linestyle)
        ax.fill_between(rates, lows, highs, color=look.color, alpha=0.16, linewidth=0)


def _val_loss(run: Run) -> float | None:
    return run.result.val_loss if run.result else None


def _peak(run: Run) -> float | None:
    """``-inf`` (nothing was seen) is no point of a logarithmic axis."""
    peak = run.result.peak_max_logit if run.result else None
    return None if peak is None or peak <= 0 else peak


def _loss_limits(summary: Summary, ax: Axes) -> tuple[float, float]:
    """Of the runs that trained: diverged ones would squeeze all others into one line."""
    losses = [
        cell.val_loss.mean
        for cell in summary.cells
        if cell.val_loss and cell.status not in FAILED and math.isfinite(cell.val_loss.mean)
    ]
    if not losses:
        return ax.get_ylim()
    margin = 0.08 * (max(losses) - min(losses)) + 0.02
    return min(losses) - margin, max(losses) + 2 * margin


# --- over the steps ----------------------------------------------------------------------------


def logits_over_steps(study: Study) -> Figure:
    """Largest logit of the model at each step, one panel per learning rate."""
    runs = [run for run in study.runs if run.steps]
    if not runs:
        raise NotDrawn("no run has recorded a step yet")
    rates = sorted({run.config.lr for run in runs})
    with style.style():
        figure, panels = _grid(len(rates), 1.75, 0.75, shared=True)
        kinds = _looks(study)
        for ax, rate in zip(panels, rates, strict=True):
            for mixer, look in kinds.items():
                same = [r for r in runs if r.config.lr == rate and r.config.mixer == mixer]
                _series(ax, same, look, lambda step: head_max(step.max_logit))
            ax.set_title(f"learning rate {rate:g}")
        lines = _logit_axis(panels)
        for ax in panels[-2:]:
            ax.set_xlabel("step")
        _headline(figure, _logit_title(study, "Max logit"))
        style.legend_below(figure, _mixer_handles(study, kinds, marker=False) + lines)
    return figure


def activations(study: Study) -> Figure:
    """Largest activation of the model and, where there are gates, their mean, over the steps."""
    rate = focus_rate(study)
    runs = [run for run in study.runs if run.config.lr == rate and run.steps]
    if not runs:
        raise NotDrawn("no run has recorded a step yet")
    gated = [run for run in runs if any(head_max(p.gate_mean) is not None for p in run.probes)]
    with style.style():
        figure = style.figure(4.9 if gated else 3.2)
        panels = figure.subplots(2 if gated else 1, 1, sharex=True, squeeze=False)[:, 0]
        kinds = _looks(study)
        for mixer, look in kinds.items():
            same = [run for run in runs if run.config.mixer == mixer]
            _series(panels[0], same, look, lambda step: _largest(step.max_activation))
            if gated:
                _gate_line(panels[1], [r for r in gated if r.config.mixer == mixer], look)
        panels[0].set_title(f"Max |activation| after any layer, learning rate {rate:g}")
        log_axis(panels[0], "y")
        if gated:
            panels[1].set_title("Mean gate (fixed validation batch)")
            panels[1].set_ylim(0, None)
        panels[-1].set_xlabel("step")
        shown = {run.config.mixer: kinds[run.config.mixer] for run in runs}
        style.legend_below(figure, _mixer_handles(study, shown, marker=False, score=False))
    return figure


def _series(
    ax: Axes, runs: Sequence[Run], look: Look, value: Callable[[Step], float | None]
) -> None:
    """Mean over seeds and their range; a run that ends in NaN ends with a cross on top."""
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for step in run.steps:
            found = value(step)
            if found is not None and 0 < found < math.inf:
                by_step.setdefault(step.step, []).append(found)
        if run.result and run.result.status == "nan" and run.steps:
            style.mark_on_top(ax, run.steps[-1].step, look)
    _mean_line(ax, by_step, look)


def _gate_line(ax: Axes, runs: Sequence[Run], look: Look) -> None:
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for probe in run.probes:
            gates = _numbers(probe.gate_mean)
            if gates:
                by_step.setdefault(probe.step, []).append(statistics.fmean(gates))
    _mean_line(ax, by_step, look, marker=look.marker)


def _mean_line(ax: Axes, points: dict[int, list[float]], look: Look, marker: str = "") -> None:
    if points:
        steps = sorted(points)
        means = [statistics.fmean(points[step]) for step in steps]
        ax.plot(steps, means, color=look.color, linestyle=look.linestyle, marker=marker)
        lows, highs = [min(points[s]) for s in steps], [max(points[s]) for s in steps]
        ax.fill_between(steps, lows, highs, color=look.color, alpha=0.14, linewidth=0)


# --- heads -------------------------------------------------------------------------------------


def head_map(study: Study, statistic: str = "max_logit") -> Figure:
    """Layers x heads, one panel per mixer, local heads left of the global ones."""
    runs = _one_per_mixer(study, statistic)
    if not runs:
        raise NotDrawn(f"no finished run has recorded {statistic.replace('_', ' ')} of its heads")
    tables = {mixer: _heads_in_order(run, statistic) for mixer, run in runs.items()}
    with style.style():
        layers = max(len(values) for values, _ in tables.values())
        figure, panels = _grid(len(runs), 0.62 + 0.2 * min(layers, 8), 0.45)
        norms = {
            score: _norm(
                statistic,
                [
                    values
                    for mixer, (values, _) in tables.items()
                    if score == (logit_kind(runs[mixer]) != "softmax_logit")
                ],
            )
            for score in (False, True)
        }
        for ax, (mixer, run) in zip(panels, runs.items(), strict=True):
            values, groups = tables[mixer]
            score = statistic == "max_logit" and logit_kind(run) != "softmax_logit"
            _map_panel(
                figure, ax, values, groups, norms[score], "Purples_r" if score else "cividis"
            )
            ax.set_title(f"{mixer} (score)" if score else mixer)
        _headline(figure, f"{STATISTICS[statistic]}; learning rate {focus_rate(study):g}")
    return figure


def _map_panel(
    figure: Figure,
    ax: Axes,
    values: np.ndarray,
    groups: Sequence[str],
    norm: Normalize,
    colors: str,
) -> None:
    """Numbers in the cells while they fit, a colour bar otherwise."""
    layers, heads = values.shape
    mesh = ax.pcolormesh(values, cmap=colors, norm=norm)
    ax.invert_yaxis()
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_yticks([n + 0.5 for n in range(layers)], [f"layer {n}" for n in range(layers)])
    spans = _spans(groups).items()
    for _, columns in spans:
        ax.axvline(columns.start, color=style.PAPER, linewidth=4 if columns.start else 0)
    ax.set_xticks([(s.start + s.stop) / 2 for _, s in spans], [name for name, _ in spans])
    if heads > 8 or layers > 12:
        figure.colorbar(mesh, ax=ax, format=FuncFormatter(compact), aspect=12)
        return
    for (layer, head), value in np.ndenumerate(values):
        if math.isfinite(value):
            color = "#fefefe" if float(norm(value)) < 0.5 else "#101010"
            place = head + 0.5, layer + 0.5, short(value)
            size = 8 if heads <= 4 else 6.5
            ax.text(*place, ha="center", va="center", color=color, fontsize=size)


def _spans(groups: Sequence[str]) -> dict[str, range]:
    """The columns of each group of heads, which stand together."""
    return {
        group: range(groups.index(group), groups.index(group) + groups.count(group))
        for group in dict.fromkeys(groups)
    }


def _norm(statistic: str, tables: Sequence[np.ndarray]) -> Normalize:
    numbers = np.concatenate([[], *(table[np.isfinite(table)] for table in tables)])
    if statistic == "first_token_share":
        return Normalize(0, 1)
    if statistic == "entropy" or not (numbers > 0).any():
        return Normalize(0, max(1.0, float(numbers.max(initial=1.0))))
    positive = numbers[numbers > 0]
    return LogNorm(float(positive.min()), max(float(positive.max()), 1.01 * float(positive.min())))


def _one_per_mixer(study: Study, statistic: str) -> dict[str, Run]:
    """The first seed of each mixer at the focus rate that recorded the statistic."""
    rate = focus_rate(study)
    found: dict[str, Run] = {}
    for run in study.runs:
        if run.config.lr == rate and run.result and _per_head(run, statistic) is not None:
            found.setdefault(run.config.mixer, run)
    return found


def _per_head(run: Run, statistic: str) -> PerHead | None:
    """Of the whole run for ``max_logit``, of the last probe otherwise."""
    if statistic != "max_logit":
        heads = getattr(run.probes[-1], statistic) if run.probes else []
        return heads if _numbers(heads) else None
    layers = len(run.header.head_groups)
    seen = [[step.max_logit[n] or [] for step in run.steps] for n in range(layers)]
    peaks: PerHead = [
        [max(found) for found in zip(*(heads for heads in layer if heads), strict=False)] or None
        for layer in seen
    ]
    return peaks if _numbers(peaks) else None


def _heads_in_order(run: Run, statistic: str) -> tuple[np.ndarray, list[str]]:
    """Values as ``[layers, heads]``, NaN where there are none, and the group of each column."""
    per_head = _per_head(run, statistic) or []
    groups = max(run.header.head_groups, key=len)
    order = sorted(range(len(groups)), key=lambda head: groups[head] != "local")
    table = np.full((len(per_head), len(groups)), np.nan)
    for layer, heads in enumerate(per_head):
        for column, head in enumerate(order):
            if heads is not None and head < len(heads):
                table[layer, column] = heads[head]
    return table, [groups[head] for head in order]


def local_and_global(summary: Summary) -> Figure:
    """Peak max logit of local and global heads as bars, one panel per learning rate."""
    cells = [cell for cell in summary.cells if cell.peak_max_logit]
    if not any(cell.peak_max_logit_local for cell in cells):
        raise NotDrawn("no finished run has local heads")
    rates = sorted({cell.lr for cell in cells})[-3:]
    mixers = list(dict.fromkeys(cell.mixer for cell in cells))
    by_cell = {(cell.mixer, cell.lr): cell for cell in cells}
    with style.style():
        figure = style.figure(1.0 + 0.34 * len(mixers))
        panels = figure.subplots(1, len(rates), sharex=True, sharey=True, squeeze=False)[0]
        for ax, rate in zip(panels, rates, strict=True):
            for row, mixer in enumerate(mixers):
                cell = by_cell.get((mixer, rate))
                if cell is not None:
                    _split_bar(ax, row, cell)
            ax.set_title(f"rate {rate:g}")
            ax.grid(False, axis="y")
        log_axis(panels[0], "x")
        _headline(figure, "Peak max logit; hatched: pre-normalisation score, another quantity")
        kinds = {cell.mixer: cell.logit_kind for cell in cells}
        names = [m if kinds[m] == "softmax_logit" else f"{m} (score)" for m in mixers]
        panels[0].set_yticks(range(len(mixers)), names)
        panels[0].invert_yaxis()
        colors = {"global heads": style.BLUE, "local heads": style.ORANGE}
        style.legend_below(figure, [Patch(color=c, label=name) for name, c in colors.items()])
    return figure


def _split_bar(ax: Axes, row: int, cell: Any) -> None:
    parts = [(cell.peak_max_logit_global, style.BLUE), (cell.peak_max_logit_local, style.ORANGE)]
    present = [(found, color) for found, color in parts if found is not None]
    height = 0.72 / max(1, len(present))
    for number, (found, color) in enumerate(present):
        if 0 < found.mean < math.inf:
            place = row + (number - (len(present) - 1) / 2) * height
            hatch = None if cell.logit_kind == "softmax_logit" else "////"
            ax.barh(
                place,
                found.mean,
                height=0.9 * height,
                color=color,
                hatch=hatch,
                edgecolor=style.PAPER,
                linewidth=0,
                xerr=found.sd if found.sd else None,
                ecolor=MUTED,
            )


def entropy_and_logits(study: Study) -> Figure:
    """Each softmax head at the end of each run: attention entropy against its largest logit."""
    with style.style():
        figure = style.figure(3.9)
        ax = figure.subplots()
        kinds = _looks(study)
        shown: dict[str, Look] = {}
        for run in study.runs:
            points = _entropy_points(run)
            if points:
                mixer = run.config.mixer
                shown[mixer] = look = kinds[mixer]
                x, y = zip(*points, strict=True)
                ax.scatter(
                    x, y, s=16, color=look.color, marker=look.marker, alpha=0.55, linewidths=0
                )
        if not shown:
            raise NotDrawn("no run has recorded the entropy of softmax heads")
        ax.set_title("Attention entropy (nats) of each head, last probe of each run")
        ax.set_xlabel("max logit of the head")
        ax.set_ylim(0, None)
        log_axis(ax, "x")
        style.legend_below(figure, _mixer_handles(study, shown, line=False, score=False))
    return figure


def _entropy_points(run: Run) -> list[tuple[float, float]]:
    if not run.probes:
        return []
    probe = run.probes[-1]
    return [
        (logit, entropy)
        for logits, entropies in zip(probe.max_logit, probe.entropy, strict=False)
        if logits and entropies
        for logit, entropy in zip(logits, entropies, strict=False)
        if 0 < logit < math.inf and math.isfinite(entropy)
    ]


# --- speed against quality ---------------------------------------------------------------------


def pareto(study: Study, summary: Summary) -> Figure:
    """Training speed against best loss; the larger the marker, the more the rate matters."""
    rows = [row for row in summary.mixers if row.best_loss and row.tokens_per_s]
    rows = [row for row in rows if row.best_loss and math.isfinite(row.best_loss.mean)]
    if len(rows) < 2:
        raise NotDrawn("it needs finished runs of two mixers or more")
    with style.style():
        figure = style.figure(3.7)
        ax = figure.subplots()
        kinds = _looks(study)
        for row in rows:
            x, y = row.tokens_per_s, row.best_loss
            assert x is not None
            assert y is not None
            size = _area(row.lr_sensitivity.mean if row.lr_sensitivity else 0.0)
            color = kinds[row.mixer].color
            ax.errorbar(x.mean, y.mean, xerr=x.sd, yerr=y.sd, color=color, linewidth=0.9)
            ax.scatter(x.mean, y.mean, s=size, color=color, alpha=0.75, linewidths=0, zorder=3)
            ax.annotate(
                row.mixer,
                (x.mean, y.mean),
                xytext=(0, 3 + math.sqrt(size) / 2),
                textcoords="offset points",
                ha="center",
            )
        ax.margins(0.16, 0.2)
        ax.set_title("Best validation loss (nats per byte)")
        ax.set_xlabel("training tokens per second")
        ax.xaxis.set_major_formatter(FuncFormatter(compact))
        dot = {"color": MUTED, "marker": "o", "linestyle": "none"}
        handles = [
            _handle(f"{value:g}", markersize=math.sqrt(_area(value)), **dot)
            for value in (0.03, 0.1, 0.3)
        ]
        style.legend_below(figure, handles, title="LR sensitivity (nats per byte)")
    return figure


def _area(sensitivity: float) -> float:
    return 24 + 500 * min(sensitivity, 1.5)


# --- shared ------------------------------------------------------------------------------------


def focus_rate(study: Study) -> float:
    """The learning rate of the plots that show one: the largest that every mixer finished."""
    done = {
        (run.config.mixer, run.config.lr)
        for run in study.runs
        if run.result and run.result.status != "nan"
    }
    mixers = {mixer for mixer, _ in done}
    rates = {rate for _, rate in done}
    common = [rate for rate in rates if all((mixer, rate) in done for mixer in mixers)]
    return max(common or rates or study.grid.learning_rates)


def short(value: float) -> str:
    """At most four characters for a cell of a heat map."""
    if abs(value) >= 1000:
        return compact(float(f"{value:.2g}"))
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"[:4].removesuffix(".")


def _looks(study: Study) -> dict[str, Look]:
    """The mixers that have run, in the grid's order; other quantities than logits are dashed."""
    kinds = {run.config.mixer: logit_kind(run) for run in study.runs}
    dashed = [mixer for mixer, kind in kinds.items() if kind != "softmax_logit"]
    return style.looks([m for m in study.grid.mixers if m in kinds], dashed)


def _mixer_handles(
    study: Study,
    kinds: dict[str, Look],
    *,
    marker: bool = True,
    line: bool = True,
    score: bool = True,
) -> list[Any]:
    names = {"linear_score": " (score)", "mixed": " (both)"} if score else {}
    suffix = {run.config.mixer: names.get(logit_kind(run), "") for run in study.runs}
    return [
        _handle(
            mixer + suffix[mixer],
            color=look.color,
            marker=look.marker if marker else "",
            linestyle=look.linestyle if line else "none",
        )
        for mixer, look in kinds.items()
    ]


def _handle(label: str, **options: Any) -> Line2D:
    return Line2D([], [], label=label, **options)


def _logit_title(study: Study, name: str) -> str:
    linear = any(logit_kind(run) != "softmax_logit" for run in study.runs)
    return f"{name}; dashed: {SCORE}, another quantity" if linear else name


def _logit_axis(panels: Sequence[Axes]) -> list[Line2D]:
    """Logarithmic, with the danger lines that the data comes near; returns their legend entry."""
    for ax in panels:
        ax.set_yscale("log")
    high = max(ax.get_ylim()[1] for ax in panels)
    danger: dict[str, Any] = {"color": style.DANGER, "linestyle": (0, (2, 2)), "linewidth": 0.9}
    for ax in panels:
        ax.set_ylim(top=max(high, 1.5 * DANGER_LINES[0]))
        log_axis(ax, "y")
        for line in DANGER_LINES:
            if line < ax.get_ylim()[1]:
                ax.axhline(line, zorder=1, **danger)
    return [_handle("danger lines", **danger)]


def _grid(
    count: int, panel: float, extra: float, *, shared: bool = False
) -> tuple[Figure, list[Axes]]:
    """``count`` panels in two columns; one alone takes the whole width."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = style.figure(rows * panel + extra)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).flat)
    for ax in panels[count:]:
        ax.remove()
    for ax in panels[count - columns : count]:
        ax.tick_params(labelbottom=True)  # also above the gap of an odd last panel
    return figure, panels[:count]


def _headline(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, horizontalalignment="left", fontsize=9)


def _numbers(values: PerHead) -> list[float]:
    return [v for heads in values if heads for v in heads if math.isfinite(v)]


def _largest(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None and math.isfinite(v)), default=None)
