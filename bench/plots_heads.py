"""The figures of single heads: where logits grow, local and global heads apart, and entropy.

Rules as in ``bench.plots``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator

from bench import plot_style as style
from bench.metrics import Cell, Summary, logit_kind
from bench.plot_style import MUTED, Look, NotDrawn, compact, log_axis
from bench.plots import focus_rate, headline, looks, mixer_handles, numbers, panel_grid
from bench.records import PerHead, Run, Study
from bench.tables import mixer_name, number

STATISTICS = {
    "max_logit": "Max logit, whole run",
    "entropy": "Attention entropy (nats), last probe",
    "first_token_share": "Attention on the first token, last probe",
}


def head_map(study: Study, statistic: str = "max_logit") -> Figure:
    """Layers x heads, one panel per mixer, local heads left of the global ones."""
    runs = _one_per_mixer(study, statistic)
    if not runs:
        raise NotDrawn(f"no finished run has recorded {statistic.replace('_', ' ')} of its heads")
    tables = {mixer: _heads_in_order(run, statistic) for mixer, run in runs.items()}
    with style.style():
        layers = max(len(values) for values, _ in tables.values())
        figure, panels = panel_grid(len(runs), 0.62 + 0.2 * min(layers, 8), 0.45)
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
            ax.set_title(mixer_name(mixer, logit_kind(run)) if score else mixer)
        headline(figure, f"{STATISTICS[statistic]}; learning rate {focus_rate(study):g}")
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
    mesh = ax.pcolormesh(np.ma.masked_invalid(values), cmap=colors, norm=norm)
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
        color = style.MUTED
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
        return heads if numbers(heads) else None
    layers = len(run.header.head_groups)
    seen = [[step.max_logit[n] or [] for step in run.steps] for n in range(layers)]
    peaks: PerHead = [
        [max(found) for found in zip(*(heads for heads in layer if heads), strict=False)] or None
        for layer in seen
    ]
    return peaks if numbers(peaks) else None


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
        panels[0].xaxis.set_major_locator(LogLocator(base=100))
        headline(figure, "Peak max logit; hatched: pre-normalisation score")
        kinds = {cell.mixer: cell.logit_kind for cell in cells}
        names = [mixer_name(mixer, kinds[mixer]) for mixer in mixers]
        panels[0].set_yticks(range(len(mixers)), names)
        panels[0].invert_yaxis()
        colors = {"global heads": style.BLUE, "local heads": style.ORANGE}
        style.legend_below(figure, [Patch(color=c, label=name) for name, c in colors.items()])
    return figure


def _split_bar(ax: Axes, row: int, cell: Cell) -> None:
    parts = [(cell.peak_max_logit_global, style.BLUE), (cell.peak_max_logit_local, style.ORANGE)]
    present = [(found, color) for found, color in parts if found is not None]
    height = 0.72 / max(1, len(present))
    for index, (found, color) in enumerate(present):
        if 0 < found.mean < math.inf:
            place = row + (index - (len(present) - 1) / 2) * height
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
        kinds = looks(study)
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
        style.legend_below(figure, mixer_handles(study, shown, line=False, score=False))
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


def short(value: float) -> str:
    """At most four characters for a cell of a heat map; nothing for NaN, where no head is."""
    if not math.isfinite(value):
        return "" if math.isnan(value) else number(value)
    if abs(value) >= 1000:
        return compact(float(f"{value:.2g}"))
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"[:4].removesuffix(".")
