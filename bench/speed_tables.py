"""What ``python -m bench speed`` prints."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.cases import DECODE


def show(console: Console, content: dict[str, Any], most_drift: float) -> None:
    """Anchors and noise, one table per function, the sweep, and what was not timed and why."""
    _show_anchors(console, content, most_drift)
    rows = content["rows"]
    for function in dict.fromkeys(row.function for row in rows):
        own = [row for row in rows if row.function == function and not row.sweep]
        if own:
            _show_function(console, function, own)
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


_COLUMNS = {  # and their widths
    "contender": 26,
    "ms": 7,
    "20-80 %": 13,
    "tokens/s": 8,
    "GFLOP/s": 8,
    "GB/s": 8,
    "% floor": 7,
    "peak MiB": 8,
    "ours / it": 20,
}
_DECODE_COLUMNS = {
    "contender": 37,
    "us in a graph": 13,
    "us eager": 8,
    "GB/s": 8,
    "% floor": 7,
    "cache MiB": 9,
    "caches": 6,
    "ours / it": 20,
}
_WIDE_ONLY = ("20-80 %", "GB/s")  # left out on a narrow terminal
_WIDE = 124


def _show_function(console: Console, function: str, rows: list[Any]) -> None:
    """A block for each case and mode."""
    console.print(f"\n[bold]{function}[/bold]")
    decode = function in DECODE
    widths = _DECODE_COLUMNS if decode else _COLUMNS
    narrow = console.width < _WIDE
    columns = [name for name in widths if decode or not (narrow and name in _WIDE_ONLY)]
    keys = dict.fromkeys((row.case, row.mode, row.dtype) for row in rows if row.status == "ok")
    for key in keys:
        table = Table(title=", ".join(key), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name in columns:
            side = "left" if name == "contender" else "right"
            table.add_column(name, justify=side, no_wrap=True, width=widths[name])  # type: ignore[arg-type]
        for row in rows:
            if row.status == "ok" and (row.case, row.mode, row.dtype) == key:
                cells = _decode_cells(row, rows) if decode else _cells(row, rows)
                table.add_row(*(cells[name] for name in columns))
        console.print(table)


def _cells(row: Any, rows: list[Any]) -> dict[str, str]:
    return {
        "contender": f"{row.contender} (ours)" if row.ours else row.contender,
        "ms": _milliseconds(row.median_s),
        "20-80 %": f"{_milliseconds(row.q20_s)}-{_milliseconds(row.q80_s)}",
        "tokens/s": _large(row.tokens_per_s),
        "GFLOP/s": f"{1e3 * row.tflops:,.{0 if row.tflops > 0.01 else 2}f}",
        "GB/s": f"{row.gbytes_per_s:.3g}",
        "% floor": f"{row.percent_of_floor:.0f}",
        "peak MiB": "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
        "ours / it": _ratio(row, rows),
    }


def _decode_cells(row: Any, rows: list[Any]) -> dict[str, str]:
    graph = row.launch == "graph"
    return {
        "contender": f"{row.contender} (ours)" if row.ours else row.contender,
        "us in a graph": _microseconds(row.median_s) if graph else "-",
        "us eager": _microseconds(row.eager_s if graph else row.median_s),
        "GB/s": f"{row.gbytes_per_s:.3g}",
        "% floor": f"{row.percent_of_floor:.0f}",
        "cache MiB": "-" if row.cache_bytes is None else f"{row.cache_bytes / 2**20:.3g}",
        "caches": str(row.input_sets),
        "ours / it": _ratio(row, rows),
    }


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


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.3g}" if seconds < 1e-3 else f"{1e6 * seconds:,.0f}"


def _large(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
