"""Feature maps before and ``act(gate) * norm_weight * RMSNorm(o)`` behind linear attention.

Rows are tokens: ``[rows, H, D]``, in the working precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_AXES = {"model": (-2, -1), "head": (-1,)}


def _elu_plus_one(x: Tensor) -> Tensor:
    return x.clamp(max=0).exp_().add_(x.relu())  # F.elu(x) + 1 would round exp(x) to its eps


def _elu_gradient(x: Tensor) -> Tensor:
    return x.clamp(max=0).exp()


def _silu_gradient(x: Tensor) -> Tensor:
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


def _sigmoid_gradient(x: Tensor) -> Tensor:
    return x.sigmoid() * (-x).sigmoid()


class Map(NamedTuple):
    """An elementwise function and its derivative."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]


IDENTITY = Map(lambda x: x, torch.ones_like)
SILU = Map(F.silu, _silu_gradient)
FEATURE_MAPS: dict[str | None, Map] = {
    "elu+1": Map(_elu_plus_one, _elu_gradient),
    "elu": Map(F.elu, _elu_gradient),
    "relu": Map(F.relu, lambda x: (x > 0).to(x.dtype)),
    "silu": SILU,
    None: IDENTITY,
}
GATES: dict[str | None, Map] = {
    "sigmoid": Map(torch.sigmoid, _sigmoid_gradient),
    "silu": SILU,
    None: IDENTITY,
}


class Epilogue(NamedTuple):
    """The parts that a call has."""

    norm: str | None
    eps: float
    norm_weight: Tensor | None  # [H, V] or [V]
    gate_activation: str | None

    @classmethod
    def of(
        cls,
        norm: str | None,
        eps: float,
        norm_weight: Tensor | None,
        gate_activation: str | None,
        dtype: torch.dtype,
    ) -> Epilogue:
        """With the weight in the working precision."""
        weight = None if norm_weight is None else norm_weight.to(dtype)
        return cls(norm, eps, weight, gate_activation)

    def forward(self, o: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output, the normalised ``o`` and the reciprocal of its root mean square."""
        y, rstd = o, None
        if self.norm is not None:
            mean_square = o.square().mean(NORM_AXES[self.norm], keepdim=True)
            rstd = (mean_square + self.eps).rsqrt()  # [rows, 1 or H, 1]
            y = o * rstd
        out = y if self.norm_weight is None else y * self.norm_weight
        if gate is not None:
            out = out * GATES[self.gate_activation].value(_elementwise(gate))
        return out, y, rstd

    def backward(
        self, dout: Tensor, y: Tensor | None, gate: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The cotangent of ``o`` without its factor ``rstd``, and those of weight and gate."""
        if y is None:  # neither norm nor weight nor gate
            return dout, None, None
        dy, dgate, dweight = dout, None, None
        if gate is not None:
            logits, activation = _elementwise(gate), GATES[self.gate_activation]
            weighted = y if self.norm_weight is None else y * self.norm_weight
            dgate = dout * weighted * activation.gradient(logits)
            dgate = dgate if gate.dim() == dout.dim() else dgate.sum(-1)
            dy = dout * activation.value(logits)
        if self.norm_weight is not None:
            per_head = self.norm_weight.dim() == 2
            dweight = (dy * y).sum(0 if per_head else (0, 1))
            dy = dy * self.norm_weight
        if self.norm is not None:
            dy = dy - (dy * y).mean(NORM_AXES[self.norm], keepdim=True) * y
        return dy, dweight, dgate


def _elementwise(gate: Tensor) -> Tensor:
    """``[rows, H, V]``, or ``[rows, H]`` as ``[rows, H, 1]``."""
    return gate if gate.dim() == 3 else gate.unsqueeze(-1)
