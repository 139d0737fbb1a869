"""The figures of the logit-growth study.

Each function takes the study, returns a ``Figure`` and raises ``NotDrawn`` with the reason where
its data is missing. Softmax logits are drawn solid; the pre-normalisation scores of linear
attention are another quantity, drawn dashed and named so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from bench import plot_style as style
from bench.metrics import DANGER_LINES, Summary, head_max, logit_kind
from bench.plot_style import MUTED, Look, NotDrawn, compact, fixed_ticks, log_axis
from bench.records import PerHead, Run, Step, Study
from bench.tables import mixer_name

FAILED = ("diverged", "nan")
SCORE = "pre-normalisation score"


# --- loss and logits against the learning rate -------------------------------------------------


def loss_and_logits(study: Study, summary: Summary) -> Figure:
    """The figure that tells the story: loss above peak max logit, over the learning rate."""
    rates = sorted({cell.lr for cell in summary.cells})
    if len(rates) < 2:
        raise NotDrawn("it needs finished runs at two learning rates or more")
    diverged = {(cell.mixer, cell.lr) for cell in summary.cells if cell.status in FAILED}
    with style.style():
        figure = style.figure(5.9)
        loss, peak = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.15))
        kinds = looks(study)
        limits = _loss_limits(summary)
        for mixer, look in kinds.items():
            runs = [run for run in study.runs if run.config.mixer == mixer and run.result]
            crossed = {lr for name, lr in diverged if name == mixer}
            _rate_line(loss, runs, look, _val_loss, crossed, limits[1])
            _rate_line(peak, runs, look, _peak)
        loss.set_title("Validation loss (nats per byte)")
        loss.set_ylim(*limits)
        peak.set_title(_logit_title(study, "Peak max logit"))
        lines = _logit_axis([peak])
        fixed_ticks(peak, rates)
        peak.set_xlim(rates[0] / 1.25, rates[-1] * 1.25)
        peak.set_xlabel("learning rate")
        handles = mixer_handles(study, kinds)
        if diverged:
            handles.append(handle("diverged, NaN", marker="x", linestyle="none", color=MUTED))
        if len(study.grid.seeds) > 1:
            handles.append(Patch(color=MUTED, alpha=0.25, linewidth=0, label="range of seeds"))
        style.legend_below(figure, handles + lines)
    return figure


def _rate_line(
    ax: Axes,
    runs: Sequence[Run],
    look: Look,
    value: Callable[[Run], float | None],
    crossed: Collection[float] = (),
    top: float = math.inf,
) -> None:
    """Mean over seeds with their range; crosses, on the upper edge where there is no number."""
    by_rate: dict[float, list[float]] = {}
    for run in sorted(runs, key=lambda run: run.config.lr):
        found = value(run)
        if found is not None:
            by_rate.setdefault(run.config.lr, []).append(found)
    points = []
    for rate, values in by_rate.items():
        mean = statistics.fmean(values)
        off = not math.isfinite(mean) or mean > top
        if off or rate in crossed:
            style.cross(ax, rate, None if off else mean, look)
        if not off:
            points.append((rate, mean, min(values), max(values)))
    if points:
        rates, means, lows, highs = zip(*points, strict=True)
        ax.plot(rates, means, color=look.color, marker=look.marker, linestyle=look.linestyle)
        ax.fill_between(rates, lows, highs, color=look.color, alpha=0.16, linewidth=0)


def _val_loss(run: Run) -> float | None:
    if run.result is None:
        return None
    return math.nan if run.result.status == "nan" else run.result.val_loss


def _peak(run: Run) -> float | None:
    """``-inf`` (nothing was seen) is no point of a logarithmic axis."""
    peak = run.result.peak_max_logit if run.result else None
    return None if peak is None or peak <= 0 else peak


def _loss_limits(summary: Summary) -> tuple[float, float]:
    """Of the runs that trained: diverged ones would squeeze all others into one line."""
    losses = [
        cell.val_loss.mean
        for cell in summary.cells
        if cell.val_loss and cell.status not in FAILED and math.isfinite(cell.val_loss.mean)
    ]
    if not losses:
        return 0.0, 1.0
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
        figure, panels = panel_grid(len(rates), 1.75, 0.75, shared=True)
        kinds = looks(study)
        for ax, rate in zip(panels, rates, strict=True):
            for mixer, look in kinds.items():
                same = [r for r in runs if r.config.lr == rate and r.config.mixer == mixer]
                _series(ax, same, look, lambda step: head_max(step.max_logit))
            ax.set_title(f"learning rate {rate:g}")
        lines = _logit_axis(panels)
        for ax in panels[-2:]:
            ax.set_xlabel("step")
        headline(figure, _logit_title(study, "Max logit"))
        style.legend_below(figure, mixer_handles(study, kinds, marker=False) + lines)
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
        kinds = looks(study)
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
        style.legend_below(figure, mixer_handles(study, shown, marker=False, score=False))
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
            style.cross(ax, run.steps[-1].step, None, look)
    _mean_line(ax, by_step, look)


def _gate_line(ax: Axes, runs: Sequence[Run], look: Look) -> None:
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for probe in run.probes:
            gates = numbers(probe.gate_mean)
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
        kinds = looks(study)
        points = []
        for row in rows:
            x, y = row.tokens_per_s, row.best_loss
            assert x is not None
            assert y is not None
            size = _area(row.lr_sensitivity.mean if row.lr_sensitivity else 0.0)
            color = kinds[row.mixer].color
            ax.errorbar(x.mean, y.mean, xerr=x.sd, yerr=y.sd, color=color, linewidth=0.9)
            ax.scatter(x.mean, y.mean, s=size, color=color, alpha=0.75, linewidths=0, zorder=3)
            points.append((row.mixer, x.mean, y.mean, math.sqrt(size) / 2))
        ax.margins(0.16, 0.2)
        _label_points(ax, points)
        ax.set_title("Best validation loss (nats per byte)")
        ax.set_xlabel("training tokens per second")
        ax.xaxis.set_major_formatter(FuncFormatter(compact))
        dot = {"color": MUTED, "marker": "o", "linestyle": "none"}
        handles = [
            handle(f"{value:g}", markersize=math.sqrt(_area(value)), **dot)
            for value in (0.03, 0.1, 0.3)
        ]
        style.legend_below(figure, handles, title="LR sensitivity (nats per byte)")
    return figure


def _label_points(ax: Axes, points: Sequence[tuple[str, float, float, float]]) -> None:
    """Names beside their dots: above, or where no other name is. Points: name, x, y, radius."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    taken: list[tuple[float, float, float]] = []  # middle and half width, in points of the page
    for name, x, y, radius in points:
        place = 300 * (x - left) / (right - left), 190 * (y - bottom) / (top - bottom)
        half, away = 2.7 * len(name), 3 + radius
        choices = [
            (0.0, away + 4, "center"),
            (0.0, -away - 5, "center"),
            (away, 0.0, "left"),
            (-away, 0.0, "right"),
        ]
        boxes = [
            (place[0] + dx + {"left": half, "right": -half}.get(side, 0.0), place[1] + dy, half)
            for dx, dy, side in choices
        ]
        free = [
            all(abs(bx - tx) > half + tw or abs(by - ty) > 11 for tx, ty, tw in taken)
            for bx, by, _ in boxes
        ]
        chosen = free.index(True) if any(free) else 0
        dx, dy, side = choices[chosen]
        taken.append(boxes[chosen])
        ax.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center")


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


def looks(study: Study) -> dict[str, Look]:
    """The mixers that have run, in the grid's order; other quantities than logits are dashed."""
    kinds = {run.config.mixer: logit_kind(run) for run in study.runs}
    dashed = [mixer for mixer, kind in kinds.items() if kind != "softmax_logit"]
    return style.looks([m for m in study.grid.mixers if m in kinds], dashed)


def mixer_handles(
    study: Study,
    kinds: dict[str, Look],
    *,
    marker: bool = True,
    line: bool = True,
    score: bool = True,
) -> list[Any]:
    """Legend entries; with ``score`` they say which maxima are no softmax logits."""
    names = {r.config.mixer: mixer_name(r.config.mixer, logit_kind(r)) for r in study.runs}
    return [
        handle(
            names[mixer] if score else mixer,
            color=look.color,
            marker=look.marker if marker else "",
            linestyle=look.linestyle if line else "none",
        )
        for mixer, look in kinds.items()
    ]


def handle(label: str, **options: Any) -> Line2D:
    return Line2D([], [], label=label, **options)


def _logit_title(study: Study, name: str) -> str:
    linear = any(logit_kind(run) != "softmax_logit" for run in study.runs)
    return f"{name}; dashed: {SCORE}" if linear else name


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
    return [handle("danger lines", **danger)]


def panel_grid(
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


def headline(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, horizontalalignment="left", fontsize=9)


def numbers(values: PerHead) -> list[float]:
    return [v for heads in values if heads for v in heads if math.isfinite(v)]


def _largest(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None and math.isfinite(v)), default=None)
