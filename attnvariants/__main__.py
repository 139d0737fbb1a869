"""``python -m attnvariants``: what is usable on this machine and, with ``--check``, is it right."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from attnvariants import __version__
from attnvariants._check_cases import CASES, Case, check
from attnvariants._select import IMPLEMENTATIONS, implementations
from attnvariants._verify import Comparison

DTYPES = (torch.float32, torch.bfloat16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints tables, or JSON; returns 1 where a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m attnvariants",
        description="Lists versions, devices and usable implementations.",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare every usable implementation with float64"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(arguments)

    environment = describe()
    if not args.json:
        print(table([(name, str(value)) for name, value in environment.items()]), end="\n\n")
        print(table(availability()))
        print(*("", *obstacles()), sep="\n")
    if not args.check and not args.json:
        return 0
    start = time.perf_counter()
    results = [one for case in CASES for one in check_all(case)] if args.check else []
    seconds = time.perf_counter() - start
    failed = sum(not result["ok"] for result in results)
    if args.json:
        report = {"environment": environment, "implementations": usable(), "checks": results}
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print("\n" + table(check_rows(results)), end="\n\n")
        print(f"{len(results)} comparisons with float64 in {seconds:.1f} s, {failed} failed")
    return int(failed > 0)


def describe() -> dict[str, Any]:
    """Versions, devices and the state of the compiled extension."""
    found = {"attnvariants": __version__, "Python": platform.python_version()}
    found["torch"] = torch.__version__
    found["triton"] = _triton()
    found["devices"] = ", ".join(_devices())
    found["C++ extension"] = _extension()
    return found


def usable() -> dict[str, dict[str, dict[str, Any]]]:
    """:func:`attnvariants.implementations`, ready for JSON."""
    return {
        function: {impl: entry._asdict() for impl, entry in entries.items()}
        for function, entries in implementations().items()
    }


def availability() -> list[tuple[str, ...]]:
    """One row per function, one column per implementation."""
    header = ("function", *IMPLEMENTATIONS)
    rows = [
        (function, *("yes" if entries[impl].usable else "no" for impl in IMPLEMENTATIONS))
        for function, entries in implementations().items()
    ]
    return [header, *rows]


def obstacles() -> list[str]:
    """Why implementations are not usable, one line per reason."""
    affected: dict[tuple[str, str], list[str]] = {}
    for function, entries in implementations().items():
        for impl, entry in entries.items():
            if not entry.usable:
                affected.setdefault((impl, entry.reason), []).append(function)
    every = len(implementations())
    return [
        f"no {impl}: {reason}" + ("" if len(names) == every else f" ({', '.join(names)})")
        for (impl, reason), names in affected.items()
    ]


def check_all(case: Case) -> list[dict[str, Any]]:
    """The worst comparison of one function per usable implementation and dtype."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for impl, entry in implementations()[case.function].items():
        if not entry.usable:
            continue
        for dtype in DTYPES:
            row: dict[str, Any] = {"function": case.function, "impl": impl}
            row["dtype"] = str(dtype).removeprefix("torch.")
            try:
                row |= summary(check(case, impl, dtype, device))
            except Exception as error:  # one broken implementation must not hide the others
                message = str(error).partition("\n")[0]
                row |= {"ok": False, "worst": f"{type(error).__name__}: {message}"}
            results.append(row)
    return results


def summary(comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """The comparison closest to its budget, or furthest beyond it."""
    worst = max(comparisons, key=_share)
    return {
        "ok": worst.ok,
        "worst": worst.name,
        "error": _strict(worst.error),
        "budget": _strict(worst.budget),
        "share": _strict(_share(worst)),
    }


def check_rows(results: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table of the checks; an exception stands in its last column."""
    header = ("function", "impl", "dtype", "", "error", "budget", "error/budget", "worst")
    rows: list[tuple[str, ...]] = [header]
    for result in results:
        numbers = ("-", "-", "-")  # it raised
        if "error" in result:
            error, budget, share = (float(result[key]) for key in ("error", "budget", "share"))
            numbers = (f"{error:.1e}", f"{budget:.1e}", f"{share:.2f}")
        call = (result["function"], result["impl"], result["dtype"])
        rows.append((*call, "ok" if result["ok"] else "FAIL", *numbers, result["worst"]))
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def _share(comparison: Comparison) -> float:
    """Error over budget; infinite for NaN, so that it counts as the worst."""
    if math.isnan(comparison.error):
        return math.inf
    return comparison.error / comparison.budget if comparison.error else 0.0


def _strict(number: float) -> float | str:
    """Strict JSON has no infinities and no NaN: they are written as strings."""
    return number if math.isfinite(number) else str(number)


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # 0: a broken driver
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        devices.append(f"cuda:{index} {properties.name} ({capability})")
    return devices


def _extension() -> str:
    if importlib.util.find_spec("attnvariants._C") is None:
        return "not built"
    try:
        importlib.import_module("attnvariants._C")
    except (ImportError, OSError) as error:
        return f"built, but does not load: {error}"
    return "built"


if __name__ == "__main__":
    sys.exit(main())
