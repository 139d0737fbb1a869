"""The figures of the speed part: time per token over the length, and ratios to the peers.

Both take the rows of ``speed.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import blended_transform_factory

from bench import plot_style as style
from bench.plot_style import NotDrawn, compact, fixed_ticks, log_axis

Row = dict[str, Any]
MOST_BARS = 60  # in one figure of ratios

_LOOKS = {
    "gated_sdpa": (style.BLUE, "D"),
    "ls_attention": (style.VERMILLION, "^"),
    "gated_linear_attention": (style.GREEN, "v"),
    "norm_linear_attention": (style.PURPLE, "P"),
    "diag_attention": (style.ORANGE, "X"),
}
_PEERS = [(style.INK, "o"), (style.MUTED, "s"), (style.SKY, "h")]


def speed_over_length(rows: Sequence[Row]) -> Figure:
    """Time per token over the sequence length, log-log, one panel per mode; flat is linear cost."""
    timed = [row for row in rows if row["status"] == "ok" and row["sweep"]]
    lengths = sorted({row["shape"]["T"] for row in timed})
    if len(lengths) < 2:
        raise NotDrawn("no sweep over two lengths or more was timed")
    modes = list(dict.fromkeys(row["mode"] for row in timed))
    names = list(dict.fromkeys(_line_name(row, timed) for row in timed))
    peers = list(dict.fromkeys(_line_name(row, timed) for row in timed if not row["ours"]))
    with style.style():
        figure = style.figure(0.9 + 2.3 * len(modes))
        panels = figure.subplots(len(modes), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        handles = {}
        for ax, mode in zip(panels, modes, strict=True):
            for name in names:
                same = [r for r in timed if r["mode"] == mode and _line_name(r, timed) == name]
                if same:
                    handles[name] = _length_line(ax, name, same, peers)
            ax.set_title(f"{mode}: microseconds per token")
        log_axis(panels[0], "y")
        fixed_ticks(panels[-1], lengths)
        panels[-1].set_xlabel("sequence length (tokens)")
        style.legend_below(figure, list(handles.values()))
    return figure


def _line_name(row: Row, rows: Sequence[Row]) -> str:
    """The function, with the implementation where several of ours were timed; or the peer."""
    if not row["ours"]:
        return str(row["contender"])
    own = {r["contender"] for r in rows if r["ours"]}
    return row["function"] if len(own) == 1 else f"{row['function']}, {row['contender']}"


def _length_line(ax: Axes, name: str, rows: Sequence[Row], peers: Sequence[str]) -> Line2D:
    ordered = sorted(rows, key=lambda row: row["shape"]["T"])
    lengths = [row["shape"]["T"] for row in ordered]
    if name in peers:
        color, marker = _PEERS[peers.index(name) % len(_PEERS)]
    else:
        color, marker = _LOOKS.get(rows[0]["function"], (style.MUTED, "p"))

    def per_token(key: str) -> list[float]:
        return [1e6 * row[key] / (row["tokens_per_s"] * row["median_s"]) for row in ordered]

    (line,) = ax.plot(
        lengths,
        per_token("median_s"),
        color=color,
        marker=marker,
        linestyle="--" if name in peers else "-",
        label=name,
    )
    low, high = per_token("q20_s"), per_token("q80_s")
    ax.fill_between(lengths, low, high, color=color, alpha=0.16, linewidth=0)
    return line


def ratio_groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each figure of ratios, by its name: one, or more where one would be too tall.

    In several figures, one per function and mode, the fastest of ours stands for the others.
    """
    bars = [row["ratio_to"] for row in rows if row["ours"] and not row["sweep"]]
    if sum(map(len, bars)) <= MOST_BARS:
        return {"speed_ratios": list(rows)}
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row["case"], row["mode"], row["dtype"])
        if row["ours"] and row["status"] == "ok" and not row["sweep"]:
            best[key] = min(best.get(key, row), row, key=lambda one: one["median_s"])
    ours = {row["contender"] for row in rows if row["ours"]}
    groups: dict[str, list[Row]] = {}
    for row in best.values():
        name = f"speed_ratios_{row['function']}_{row['mode'].replace('+', '_')}"
        peers = {peer: r for peer, r in row["ratio_to"].items() if peer not in ours}
        groups.setdefault(name, []).append({**row, "ratio_to": peers})
    return groups


def speed_ratios(rows: Sequence[Row]) -> Figure:
    """Our time over each peer's as bars from 1, with the range over the rounds."""
    bars = [
        (row, peer, ratio)
        for row in rows
        if row["ours"] and row["status"] == "ok" and not row["sweep"]
        for peer, ratio in row["ratio_to"].items()
    ]
    if not bars:
        raise NotDrawn("no peer was timed beside an implementation of this package")
    cases = list(dict.fromkeys((row["case"], row["mode"], row["contender"]) for row, _, _ in bars))
    several = len({contender for _, _, contender in cases}) > 1
    with style.style():
        figure = style.figure(0.75 + 0.2 * (len(bars) + 1.4 * len(cases)))
        ax = figure.subplots()
        place = 0.0
        ticks, labels = [], []
        for case in cases:
            name, mode, contender = case
            own = f", {contender}" if several else ""
            heading = ax.text(0.01, place, f"{name}, {mode}{own}", va="center", fontsize=8.5)
            heading.set_bbox({"facecolor": style.PAPER, "edgecolor": "none", "pad": 1.5})
            heading.set_transform(blended_transform_factory(figure.transFigure, ax.transData))
            heading.set_in_layout(False)
            for row, peer, ratio in bars:
                if (row["case"], row["mode"], row["contender"]) == case:
                    place += 1
                    ticks.append(place)
                    labels.append(peer)
                    _ratio_bar(ax, place, ratio)
            place += 1.4
        ax.set_xscale("log")
        ax.set_ylim(place - 0.5, -0.8)
        ax.set_yticks(ticks, labels)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(False, axis="y")
        ax.axvline(1.0, color=style.MUTED, linewidth=1)
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=7))
        ax.xaxis.set_major_formatter(FuncFormatter(compact))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_title("Our time / the time of the peer; left of 1 is faster")
    return figure


def _ratio_bar(ax: Axes, place: float, ratio: dict[str, float]) -> None:
    median = ratio["median"]
    ax.barh(
        place,
        median - 1,
        left=1,
        height=0.66,
        color=style.BLUE if median <= 1 else style.ORANGE,
        xerr=[[max(0.0, median - ratio["low"])], [max(0.0, ratio["high"] - median)]],
        ecolor=style.INK,
        error_kw={"linewidth": 1},
    )
