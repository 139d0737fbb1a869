"""The tables of the comparison with float64, from the rows of ``verify.json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from bench.document import Table
from bench.tables import number

Row = dict[str, Any]


def verify_summary(rows: Iterable[Row]) -> Table:
    """Function x implementation x dtype with the worst comparison of each."""
    groups = _grouped(rows, lambda row: (row["function"], row["impl"], row["dtype"]))
    cells = []
    for key, group in groups.items():
        worst = max(group, key=lambda row: _severity(row))
        failed = sum(not row["ok"] for row in group)
        cells.append(
            (
                *key[1:],
                f"{worst['name']}, {worst['case']}",
                number(_severity(worst), 2),
                str(failed),
                str(len(group)),
            )
        )
    columns = (
        "implementation",
        "dtype",
        "worst comparison",
        "its error / budget",
        "failed",
        "comparisons",
    )
    note = (
        "Against float64. The budget is twice the error of the definition computed in the same "
        "precision, plus one rounding; up to 1 is within it."
    )
    functions = [function for function, _, _ in groups]
    return Table("Comparisons with float64", columns, cells, 3, note, functions)


def _severity(row: Row) -> float:
    error, budget = row["error"], row["budget"]
    if math.isnan(error):
        return math.inf
    if budget == 0:
        return 0.0 if error == 0 else math.inf
    return float(error / budget)


def verify_failures(rows: Iterable[Row]) -> Table | None:
    """Every comparison over its budget."""
    cells = [
        (
            row["function"],
            row["impl"],
            row["dtype"],
            row["case"],
            row["name"],
            row.get("reason") or "",
            f"{row['error']:.2e}",
            f"{row['budget']:.2e}",
        )
        for row in rows
        if not row["ok"]
    ]
    columns = ("function", "implementation", "dtype", "case", "what", "reason", "error", "budget")
    return Table("Failed comparisons", columns, cells, 6) if cells else None


def not_verified(rows: Iterable[Row]) -> Table | None:
    """What verify left out, and why."""
    groups = _grouped(rows, lambda row: (row["impl"], row["reason"]))
    cells = [
        (impl, ", ".join(dict.fromkeys(row["function"] for row in group)), reason)
        for (impl, reason), group in groups.items()
    ]
    columns = ("implementation", "function", "reason")
    return Table("Not verified", columns, cells, 3) if cells else None


def _grouped(
    rows: Iterable[Row], key: Callable[[Row], tuple[str, ...]]
) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
