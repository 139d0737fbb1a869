"""The tables of the speed part, from the rows of ``speed.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.cases import DECODE
from bench.document import Table
from bench.tables import ABSENT, duration, mebibytes, number

Row = dict[str, Any]


def speed(rows: Sequence[Row], function: str) -> Table | None:
    """All contenders of one function, apart from the sweep over the length."""
    own = [r for r in rows if r["function"] == function and not r["sweep"] and r["status"] == "ok"]
    columns = _DECODE_COLUMNS if function in DECODE else _COLUMNS
    make = _decode_cells if function in DECODE else _cells
    cells = [
        (
            row["contender"] + (" (ours)" if row["ours"] else ""),
            "" if row["ours"] else _ratios(row, own),
            *make(row),
        )
        for row in own
    ]
    groups = [f"{row['case']}, {_mode(row, rows)}" for row in own]
    return Table(f"Speed of {function}", columns, cells, 1, groups=groups) if own else None


_COLUMNS = (
    "contender",
    "our time / its (range)",
    "time in ms (20 to 80 %)",
    "tokens/s",
    "TFLOP/s",
    "GB/s",
    "% of floor",
    "peak memory (MiB)",
)
_DECODE_COLUMNS = (
    "contender",
    "our time / its (range)",
    "microseconds in a CUDA graph",
    "eager",
    "GB/s",
    "% of floor",
    "cache (MiB)",
)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{duration(row['median_s'])} ({duration(row['q20_s'])} to {duration(row['q80_s'])})",
        number(row["tokens_per_s"]),
        number(row["tflops"]),
        number(row["gbytes_per_s"]),
        number(row["percent_of_floor"], 0),
        mebibytes(row["peak_bytes"]),
    )


def _decode_cells(row: Row) -> tuple[str, ...]:
    graph = row["launch"] == "graph"
    return (
        number(1e6 * row["median_s"]) if graph else ABSENT,
        number(1e6 * (row["eager_s"] if graph else row["median_s"])),
        number(row["gbytes_per_s"]),
        number(row["percent_of_floor"], 0),
        mebibytes(row["cache_bytes"]),
    )


def _mode(row: Row, rows: Sequence[Row]) -> str:
    """With the dtype where several were timed."""
    several = len({other["dtype"] for other in rows}) > 1
    return f"{row['mode']}, {row['dtype']}" if several else str(row["mode"])


def _ratios(peer: Row, rows: Sequence[Row]) -> str:
    """The time of each of ours over this peer's, in the same case, mode and dtype."""
    found = []
    for row in rows:
        same = all(row[key] == peer[key] for key in ("case", "mode", "dtype"))
        if same and row["ours"] and peer["contender"] in row["ratio_to"]:
            ratio = row["ratio_to"][peer["contender"]]
            text = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            found.append((row["contender"], text))
    if len(found) == 1:
        return found[0][1]
    return "; ".join(f"{name} {text}" for name, text in found) or ABSENT


def sweep(rows: Sequence[Row]) -> Table | None:
    """Microseconds per token, one row per length."""
    timed = [row for row in rows if row["sweep"] and row["status"] == "ok"]
    names = list(dict.fromkeys(_contender(row) for row in timed))
    keys = list(dict.fromkeys((_mode(row, rows), row["shape"]["T"]) for row in timed))
    found = {(_mode(row, rows), row["shape"]["T"], _contender(row)): row for row in timed}

    def per_token(row: Row | None) -> str:
        return ABSENT if row is None else number(1e6 / row["tokens_per_s"])

    keys.sort(key=lambda key: key[0])
    cells = [
        (str(length), *(per_token(found.get((mode, length, name))) for name in names))
        for mode, length in keys
    ]
    title = "Time per token over the length (microseconds)"
    groups = [mode for mode, _ in keys]
    return Table(title, ("length", *names), cells, 1, groups=groups) if cells else None


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
