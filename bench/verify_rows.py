"""The rows of ``verify.json``, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One output or gradient of one case. ``reason`` says why a call failed outright."""

    function: str
    impl: str
    dtype: str
    case: str
    name: str
    error: float
    budget: float
    ok: bool
    reason: str = ""

    @property
    def ratio(self) -> float:
        """Error over budget: up to 1 is within it."""
        if self.error <= self.budget:
            return self.error / self.budget if self.budget else 0.0
        return self.error / self.budget if self.budget else math.inf


@dataclass(frozen=True)
class NotRun:
    """What was left out, and why."""

    function: str
    impl: str
    dtype: str
    case: str
    reason: str


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry per function, implementation and dtype, with its worst comparison."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.function, row.impl, row.dtype), []).append(row)
    return [
        {
            "function": function,
            "impl": impl,
            "dtype": dtype,
            "cases": len({row.case for row in group}),
            "comparisons": len(group),
            "failed": sum(not row.ok for row in group),
            "worst_ratio": _worst(group).ratio,
            "worst": f"{_worst(group).name} of {_worst(group).case}",
        }
        for (function, impl, dtype), group in groups.items()
    ]


def _worst(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: math.inf if math.isnan(row.ratio) else row.ratio)


def show(console: Console, rows: Sequence[Row], not_run: Sequence[NotRun]) -> None:
    """The summary as a table, failing comparisons in full, and what was not run."""
    table = Table(title="Largest error over its budget (1 is the limit)", title_justify="left")
    for name in ("function", "impl", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("cases", "comparisons", "worst"):
        table.add_column(name, justify="right")
    table.add_column("worst comparison")
    table.add_column("")
    previous = ""
    for entry in summarize(rows):
        if previous and entry["function"] != previous:
            table.add_section()
        previous = entry["function"]
        table.add_row(
            entry["function"],
            entry["impl"],
            entry["dtype"],
            str(entry["cases"]),
            str(entry["comparisons"]),
            f"{entry['worst_ratio']:.2f}",
            entry["worst"],
            f"[red]{entry['failed']} FAILED[/red]" if entry["failed"] else "[green]ok[/green]",
        )
    console.print(table)
    for row in rows:
        if not row.ok:
            what = row.reason or f"error {row.error:.3e} > budget {row.budget:.3e}"
            console.print(
                f"FAILED {row.function} {row.impl} {row.dtype} [{row.case}] {row.name}: {what}",
                style="red",
                markup=False,
                soft_wrap=True,
            )
    for (impl, reason), names in _by_reason(not_run).items():
        console.print(
            f"not run: {impl} for {', '.join(names)}: {reason}", markup=False, soft_wrap=True
        )


def _by_reason(not_run: Sequence[NotRun]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in not_run:
        name = " ".join(filter(None, (entry.function, entry.dtype)))
        name += f" [{entry.case}]" if entry.case else ""
        groups.setdefault((entry.impl, entry.reason), []).append(name)
    return groups
