"""The comparison itself: it must be able to fail."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping

import pytest
import torch

import attnvariants
from attnvariants._verify import (
    Comparison,
    compare,
    exact_and_error,
    judge,
    settle,
    shuffle_channels,
    within,
)


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


def _settled(*draws: tuple[float, float]) -> tuple[bool, int]:
    """Verdict for one result with these errors and budgets, and how often it was measured."""
    left = list(draws)

    def measure(draw: int) -> list[Comparison]:
        assert draw == len(draws) - len(left)
        return [Comparison("a", *left.pop(0)), Comparison("b", 0.5, 1.0)]

    first, other = settle(measure)
    assert other.ok
    return first.ok, len(draws) - len(left)


def test_after_a_miss_the_largest_error_meets_the_largest_budget() -> None:
    assert _settled((0.9, 1.0), (9.0, 1.0)) == (True, 1)
    lucky_budget = [(1.2, 1.0), (0.9, 1.0), (0.8, 1.5), (0.9, 1.0), (0.9, 1.0)]
    assert _settled(*lucky_budget) == (True, 5)
    defect = [(1.2, 1.0), (0.1, 1.0), (0.1, 1.0), (0.1, 1.0), (0.1, 1.1)]
    assert _settled(*defect) == (False, 5)  # the miss is not forgotten


def test_a_hopeless_miss_is_final() -> None:
    assert _settled((5.0, 1.0), (0.9, 1.0)) == (False, 1)
    assert _settled((math.nan, 1.0), (0.9, 1.0)) == (False, 1)
    assert _settled((1.2, 1.0), (math.nan, 9.0), *[(0.1, 9.0)] * 3) == (False, 5)


@pytest.mark.parametrize("function", ["gated_sdpa", "gated_linear_attention"])
def test_shuffled_channels_are_the_same_problem(function: str) -> None:
    shape = (2, 9, 2)
    tensors = {
        "q": torch.randn(*shape, 4),
        "k": torch.randn(*shape, 4),
        "v": torch.randn(*shape, 6),
        "gate": torch.randn(*shape, 6),
    }
    options: dict[str, object] = {"upcast": False}
    if function == "gated_linear_attention":
        tensors |= {"g": -torch.rand(*shape, 4), "norm_weight": torch.randn(2, 6)}
        tensors |= {"initial_state": torch.randn(2, 2, 4, 6)}
        options |= {"norm": "head", "return_state": True}
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    shuffled = shuffle_channels(exact, draw=1)
    assert not torch.equal(exact["q"], shuffled["q"])
    definition = getattr(importlib.import_module(f"attnvariants.reference.{function}"), function)
    found, expected = definition(**shuffled, **options), definition(**exact, **options)
    if function == "gated_linear_attention":
        (found, state), (expected, last) = found, expected
        torch.testing.assert_close(state.sum(), last.sum())
        torch.testing.assert_close(state.square().sum(), last.square().sum())
    torch.testing.assert_close(found.sort(-1).values, expected.sort(-1).values)


def test_a_defect_just_beyond_the_budget_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: torch.randn(1, 30, 2, 8) for name in ("q", "k", "v")}
    rows = compare("gated_sdpa", tensors, impl="reference", dtype=torch.float32, gradients=False)
    right = attnvariants.gated_sdpa

    def wrong(**arguments: object) -> torch.Tensor:
        out = right(**arguments)
        return out + 2 * rows[0].budget * torch.sign(out)

    monkeypatch.setattr(attnvariants, "gated_sdpa", wrong, raising=False)
    (row,) = compare("gated_sdpa", tensors, impl="reference", dtype=torch.float32, gradients=False)
    assert not row.ok
