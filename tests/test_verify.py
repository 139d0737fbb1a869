"""The comparison itself: it must be able to fail."""

from __future__ import annotations

import math

import pytest
import torch

from attnvariants._verify import judge


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
