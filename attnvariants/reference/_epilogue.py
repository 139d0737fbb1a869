"""What follows the linear attentions: ``act(gate) * norm_weight * RMSNorm(o)``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

NORM_AXES = {"model": (-2, -1), "head": (-1,)}

GATES = {"sigmoid": F.sigmoid, "silu": F.silu, None: lambda gate: gate}


def epilogue(
    o: Tensor,
    norm: str | None,
    norm_weight: Tensor | None,
    eps: float,
    gate: Tensor | None,
    gate_activation: str | None,
) -> Tensor:
    """Applies the given parts to ``o [..., H, V]``; ``eps`` is inside the root."""
    if norm is not None:
        mean_square = o.square().mean(NORM_AXES[norm], keepdim=True)
        o = o * (mean_square + eps).rsqrt()
    if norm_weight is not None:  # [H, V] or [V]
        o = o * norm_weight
    if gate is not None:  # [..., H, V] or [..., H]
        gate = gate if gate.dim() == o.dim() else gate.unsqueeze(-1)
        o = GATES[gate_activation](gate) * o
    return o
