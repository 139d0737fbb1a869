"""What all plots share: size, colours that colour-blind readers tell apart, plain tick labels.

Figures are drawn for the width of a phone; on a desktop they only grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

WIDTH = 4.3  # inches
INK, MUTED, RULE, PAPER = "#1c2430", "#5b6675", "#d3d9e2", "#ffffff"
DANGER = "#b3261e"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito

_KNOWN = {
    "mhsa": (INK, "o"),
    "mhsa+qknorm": (SKY, "s"),
    "ls": (VERMILLION, "^"),
    "gated": (BLUE, "D"),
    "gla": (GREEN, "v"),
    "transnormer": (PURPLE, "P"),
}
_OTHERS = [(ORANGE, "X"), ("#8c6d31", "<"), ("#7b5ea7", ">"), ("#4d7a8c", "p"), (MUTED, "h")]

_STYLE: dict[Any, Any] = {  # matplotlib types the keys, from 3.11 on
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.9,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "attnvariants",
    "mathtext.default": "regular",
}


class NotDrawn(Exception):
    """The data for a plot is missing; the message says which."""


def style() -> AbstractContextManager[None]:
    """The settings under which figures are made and saved."""
    return mpl.rc_context(_STYLE)


def figure(height: float) -> Figure:
    """An empty figure, ``height`` inches high."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def save(drawn: Figure, stem: Path) -> None:
    """Writes ``stem.png`` and ``stem.svg``, the same bytes for the same data."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with style():
        drawn.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    save_png(drawn, stem.with_suffix(".png"))


def save_png(drawn: Figure, path: Path) -> None:
    """Writes one image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        drawn.savefig(path, format="png", metadata={"Software": None})


@dataclass(frozen=True)
class Look:
    """How one mixer or contender is drawn in every plot of a report."""

    color: str
    marker: str
    linestyle: str
    shift: float = 0.0  # points to the side, of marks that would cover each other


def looks(names: Sequence[str], dashed: Iterable[str] = ()) -> dict[str, Look]:
    """One look per name: known mixers keep their colour in every report."""
    spare = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    broken = set(dashed)
    found = {}
    for number, name in enumerate(names):
        color, marker = _KNOWN[name] if name in _KNOWN else next(spare)
        shift = 7 * (number - (len(names) - 1) / 2)
        found[name] = Look(color, marker, "--" if name in broken else "-", shift)
    return found


def compact(value: float, _position: object = None) -> str:
    """Tick label: 0.01, 1, 300, 20k, 1M."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def log_axis(ax: Axes, which: str) -> None:
    """Logarithmic scale with plain numbers at the decades, or in between where they are few."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    subs = (1.0, 2.0, 5.0) if decades < 1.5 else ((1.0, 3.0) if decades < 2.5 else (1.0,))
    axis.set_major_locator(LogLocator(subs=subs, numticks=8 if which == "y" else 6))
    axis.set_major_formatter(FuncFormatter(compact))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def fixed_ticks(ax: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with ticks at ``values`` only."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(list(values)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def legend_below(drawn: Figure, handles: Sequence[Artist], title: str | None = None) -> None:
    """One legend for the whole figure, under the panels so that it covers no data."""
    labelled = {str(handle.get_label()): handle for handle in handles}
    drawn.legend(
        handles=list(labelled.values()),
        loc="outside lower center",
        ncols=_columns(list(labelled)),
        columnspacing=0.9,
        title=title,
        title_fontsize=9,
    )


def _columns(labels: Sequence[str]) -> int:
    """As many columns as the width of the figure holds, filled from top to bottom."""
    size = _STYLE["legend.fontsize"]
    handle, gap, border = 2.7 * size, 0.9 * size, 0.9 * size
    widths = [handle + TextPath((0, 0), label, size=size).get_extents().width for label in labels]
    for count in (4, 3, 2):
        rows = math.ceil(len(labels) / count)
        columns = [max(widths[first : first + rows]) for first in range(0, len(labels), rows)]
        if len(columns) == count and sum(columns) + gap * (count - 1) + border < 72 * WIDTH:
            return count
    return 1


def cross(ax: Axes, x: float, y: float | None, look: Look) -> None:
    """Marks what went wrong, on the upper edge where ``y`` is off the scale, infinite or NaN."""
    place = ax.transData
    if y is None:  # several may meet here: side by side
        figure = ax.get_figure()
        assert figure is not None
        aside = ScaledTranslation(look.shift / 72, 0, figure.dpi_scale_trans)
        place = ax.get_xaxis_transform() + aside
    ax.plot(
        [x],
        [1.0 if y is None else y],
        transform=place,
        marker="x",
        markersize=6 if y is None else 11,
        markeredgewidth=1.8,
        color=look.color,
        linestyle="none",
        clip_on=False,
        zorder=5,
    )
