"""The assertion behind every numeric test: see ``attnvariants/_verify.py`` for the budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnvariants._verify import Comparison, compare, judge


def assert_matches_definition(
    function: str,
    tensors: Mapping[str, Tensor | None],
    options: Mapping[str, Any] | None = None,
    *,
    impl: str,
    dtype: torch.dtype,
    gradients: bool = True,
) -> None:
    """Outputs and gradients of ``impl`` against float64, within the budget of the data."""
    rows = compare(function, tensors, options, impl=impl, dtype=dtype, gradients=gradients)
    _raise_on_failure(rows, f"{function} impl={impl} {dtype} {dict(options or {})}")


def assert_within_budget(
    actual: Tensor, truth: Tensor, low_precision: Tensor, name: str = "result"
) -> None:
    """``actual`` may err twice as much as ``low_precision``, plus one rounding."""
    _raise_on_failure([judge(name, actual, truth, low_precision, actual.dtype)], name)


def _raise_on_failure(rows: list[Comparison], title: str) -> None:
    failed = [row for row in rows if not row.ok]
    if failed:
        lines = [f"{row.name}: error {row.error:.3e} > budget {row.budget:.3e}" for row in failed]
        raise AssertionError("\n".join([title, *lines]))
