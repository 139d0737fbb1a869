"""Gates inside the kernels: values and logarithmic derivatives, against float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from attnvariants.eager import _gate as eager
from attnvariants.kernels import _gate as kernels

ACTIVATIONS = ("sigmoid", "ns_sigmoid", "softplus")


@triton.jit
def _evaluate(p_x, p_y, p_d, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(p_x + index)
    tl.store(p_y + index, kernels.activate(x, ACTIVATION))
    tl.store(p_d + index, kernels.log_derivative(x, ACTIVATION))


def evaluate(activation: str, logits: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = torch.empty_like(logits), torch.empty_like(logits)
    _evaluate[(1,)](logits, value, slope, activation, logits.numel())
    return value, slope


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_relative_accuracy(activation: str) -> None:
    """Four roundings, also where the gate is all but closed and a difference would cancel."""
    logits = torch.cat([torch.linspace(-87, 87, 2000), torch.linspace(-2, 2, 48)])
    for actual, exact in zip(
        evaluate(activation, logits),
        (f(activation, logits.double()) for f in (eager.activate, eager.log_derivative)),
        strict=True,
    ):
        assert ((actual - exact) / exact).abs().max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_limits(activation: str) -> None:
    logits = torch.tensor([-torch.inf, -1e30, -200.0, torch.nan, 200.0, 1e30, torch.inf, 0.0])
    value, slope = evaluate(activation, logits)
    torch.testing.assert_close(value, eager.activate(activation, logits), equal_nan=True)
    torch.testing.assert_close(
        slope, eager.log_derivative(activation, logits), equal_nan=True, atol=1e-35, rtol=1e-6
    )
