"""The comparison itself: it must be able to fail."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from attnvariants._verify import compare, exact_and_error, judge, within


def _judge(actual: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> bool:
    return judge("x", actual, truth, plain, torch.float32).ok


def test_budget_is_twice_the_plain_error_plus_one_rounding() -> None:
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    row = judge("x", truth + 1e-3, truth, truth - 1e-3, torch.float32)
    assert row.budget == pytest.approx(2e-3 + torch.finfo(torch.float32).eps * 2)
    assert row.ok
    assert not _judge(truth + 2.1e-3, truth, truth - 1e-3)
    assert not _judge(truth + 1e-6, truth, truth)
    assert _judge(truth + 2e-7, truth, truth)


def test_nan_wrong_shape_and_wrong_infinity_fail() -> None:
    truth = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    assert _judge(truth.clone(), truth, truth)
    assert not _judge(torch.tensor([math.nan, -math.inf]), truth, truth)
    assert not _judge(torch.tensor([1.0, math.inf]), truth, truth)
    assert not _judge(torch.tensor([1.0, 5.0]), truth, truth)
    assert not _judge(torch.tensor([1.0]), truth, truth)


def test_nan_in_the_plain_run_does_not_widen_the_budget() -> None:
    truth = torch.tensor([1.0], dtype=torch.float64)
    assert not _judge(truth + 1.0, truth, torch.tensor([math.nan]))


def test_float64_budget_is_the_float32_error_scaled_down() -> None:
    x = torch.randn(64, 64, dtype=torch.float64)

    def define(
        inputs: Mapping[str, torch.Tensor | None], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        assert inputs["x"] is not None
        return {"product": inputs["x"] @ inputs["x"], "inf": torch.tensor(math.inf)}

    truth, errors = exact_and_error(define, {"x": x}, torch.float64)
    assert 1e-17 < errors["product"] < 1e-13
    assert errors["inf"] == 0
    one_by_one = torch.zeros_like(x)
    for column in reversed(range(64)):
        one_by_one += x[:, column : column + 1] * x[column]
    row = within("product", one_by_one, truth["product"], errors["product"], torch.float64)
    assert row.error > 0
    assert row.ok


def test_every_precision_of_the_reference_passes() -> None:
    tensors = {name: torch.randn(1, 20, 2, 8) for name in ("q", "k", "v", "gate")}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        rows = compare("gated_sdpa", tensors, impl="reference", dtype=dtype)
        assert {row.name for row in rows} == {"out", "dq", "dk", "dv", "dgate"}
        assert all(row.ok and row.budget > 0 for row in rows)
