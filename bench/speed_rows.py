"""The rows of ``speed.json``, and what is computed from several of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OK, MISSING, FAILED = "ok", "missing", "failed verify"
LINEAR_COST = frozenset({"gated_linear_attention", "norm_linear_attention", "diag_attention"})


@dataclass
class Row:
    """One contender in one case, mode and dtype."""

    case: str
    function: str
    mode: str
    shape: dict[str, Any]
    dtype: str
    contender: str
    ours: bool
    status: str
    reason: str | None = None
    median_s: float | None = None
    q20_s: float | None = None
    q80_s: float | None = None
    rounds: int | None = None
    peak_bytes: int | None = None
    tokens_per_s: float | None = None
    tflops: float | None = None
    gbytes_per_s: float | None = None
    floor_s: float | None = None
    percent_of_floor: float | None = None
    ratio_to: dict[str, dict[str, float]] = field(default_factory=dict)
    sweep: bool = False
    launch: str | None = None  # "eager" or "graph"
    eager_s: float | None = None  # one call without the CUDA graph
    input_sets: int | None = None
    cache_bytes: int | None = None  # of a decode step's cache or state
    flops: float | None = None
    bytes: float | None = None


def flatness(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How constant the time per token is over the sweep, where the cost grows with the length."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.sweep and row.ours and row.status == OK and row.function in LINEAR_COST:
            key = (row.function, row.mode, row.dtype, row.contender)
            groups.setdefault(key, []).append(row)
    found = []
    for (function, mode, dtype, contender), group in groups.items():
        per_token = [1 / row.tokens_per_s for row in group if row.tokens_per_s]
        if len(per_token) < 2:
            continue
        mean = statistics.fmean(per_token)
        found.append(
            {
                "function": function,
                "mode": mode,
                "dtype": dtype,
                "contender": contender,
                "lengths": [row.shape["T"] for row in group],
                "deviation": max(abs(value / mean - 1) for value in per_token),
            }
        )
    return found
