"""What ``python -m bench speed`` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(console: Console, content: dict[str, Any], most_drift: float) -> None:
    """Anchors and noise, one table per function, the sweep, and what was not timed and why."""
    _show_anchors(console, content, most_drift)
    rows = content["rows"]
    for function in dict.fromkeys(row.function for row in rows):
        own = [row for row in rows if row.function == function and not row.sweep]
        if any(row.status == "ok" for row in own):
            console.print(_table(function, own, content["environment"]["gpu"] is not None))
    sweep = [row for row in rows if row.sweep and row.status == "ok"]
    if sweep:
        console.print(_sweep(sweep))
    for entry in content["flatness"]:
        console.print(
            f"{entry['function']} ({entry['contender']}, {entry['mode']}, {entry['dtype']}): time "
            f"per token from T = {entry['lengths'][0]} to {entry['lengths'][-1]} within "
            f"{100 * entry['deviation']:.0f} % of its mean",
            markup=False,
            soft_wrap=True,
        )
    _show_missing(console, rows)


def _show_anchors(console: Console, content: dict[str, Any], most_drift: float) -> None:
    for anchors in content["anchors"]["measured"]:
        rates = ", ".join(
            f"{name} matmul {rate / 1e9:,.0f} GFLOP/s"
            for name, rate in anchors.matmul_flops_per_s.items()
        )
        copy = anchors.copy_bytes_per_s / 1e9
        console.print(f"anchors, {anchors.moment}: copy {copy:,.1f} GB/s, {rates}", markup=False)
    drift = content["anchors"]["drift"]
    note = ": the machine was disturbed, trust ratios only" if drift > most_drift else ""
    console.print(f"anchors drifted by {100 * drift:.1f} %{note}", markup=False)
    if content["noise"]:
        low = min(entry["low"] for entry in content["noise"])
        high = max(entry["high"] for entry in content["noise"])
        console.print(
            f"the same call against itself: ratios from {low:.2f} to {high:.2f}; "
            "smaller differences are noise",
            markup=False,
        )


def _table(function: str, rows: list[Any], gpu: bool) -> Table:
    """A line for each case and mode, and its contenders below it."""
    unit, scale = ("TFLOP/s", 1.0) if gpu else ("GFLOP/s", 1e3)
    table = Table(title=function, title_justify="left")
    table.add_column("case, mode, dtype", no_wrap=True)
    for name in ("ms", "20-80 %", "tokens/s", unit, "GB/s", "% floor", "peak MiB", "ours / it"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if row.status != "ok":
            continue
        key = f"{row.case}, {row.mode}, {row.dtype}"
        if key != previous:
            table.add_section()
            table.add_row(f"[bold]{key}[/bold]")
        previous = key
        table.add_row(
            f"  {row.contender} (ours)" if row.ours else f"  {row.contender}",
            _milliseconds(row.median_s),
            f"{_milliseconds(row.q20_s)}-{_milliseconds(row.q80_s)}",
            _large(row.tokens_per_s),
            f"{scale * row.tflops:.3g}",
            f"{row.gbytes_per_s:.3g}",
            f"{row.percent_of_floor:.0f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
            _ratio(row, rows),
        )
    return table


def _ratio(row: Any, rows: list[Any]) -> str:
    """The time of our first implementation over this contender's."""
    for ours in rows:
        same = (ours.case, ours.mode, ours.dtype) == (row.case, row.mode, row.dtype)
        if same and ours.ours and row.contender in ours.ratio_to:
            found = ours.ratio_to[row.contender]
            return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"
    return ""


def _sweep(rows: list[Any]) -> Table:
    """Tokens per second over the length."""
    lengths = sorted({row.shape["T"] for row in rows})
    table = Table(title="Tokens per second over the length", title_justify="left")
    table.add_column("mode, dtype")
    table.add_column("contender", no_wrap=True)
    for length in lengths:
        table.add_column(f"T={length}", justify="right", no_wrap=True)
    found: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        name = f"{row.function} ({row.contender})" if row.ours else row.contender
        line = found.setdefault((f"{row.mode}, {row.dtype}", name), {})
        line[row.shape["T"]] = _large(row.tokens_per_s)
    previous = None
    for (mode, name), line in sorted(found.items(), key=lambda item: item[0][0]):
        if previous not in (None, mode):
            table.add_section()
        cells = (line.get(length, "-") for length in lengths)
        table.add_row(mode if mode != previous else "", name, *cells)
        previous = mode
    return table


def _show_missing(console: Console, rows: list[Any]) -> None:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            key = (row.status, row.contender, row.reason or "")
            reasons.setdefault(key, []).append(row.function)
    for (status, contender, reason), functions in reasons.items():
        console.print(
            f"{status}: {contender} for {', '.join(dict.fromkeys(functions))}: {reason}",
            style="red" if status == "failed verify" else None,
            markup=False,
            soft_wrap=True,
        )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def _large(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
