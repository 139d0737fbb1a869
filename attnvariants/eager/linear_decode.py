"""Decode steps of linear attention in plain PyTorch, with the state updated in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "elu+1": lambda x: F.elu(x) + 1,
    "elu": F.elu,
    "relu": F.relu,
    "silu": F.silu,
    None: lambda x: x,
}
GATES: dict[str | None, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    None: lambda x: x,
}
NORM_AXES = {"model": (-2, -1), "head": (-1,)}


def attend(
    q: Tensor,  # [B, Q, H, K]
    k: Tensor,  # [B, Q, H, K]
    v: Tensor,  # [B, Q, H, V]
    g: Tensor | None,  # [B, Q, H, K], [B, Q, H] or [H]
    state: Tensor,  # [B, H, K, V]
    lengths: Tensor | None,  # int32 [B]
    norm_weight: Tensor | None,  # [H, V] or [V]
    gate: Tensor | None,  # [B, Q, H, V] or [B, Q, H]
    feature_map: str | None,
    scale: float,
    norm: str | None,
    eps: float,
    gate_activation: str | None,
) -> Tensor:
    """One read-modify-write of the state per token; then the epilogue, in the state's dtype."""
    wide, dtype = state.dtype, v.dtype
    q = FEATURE_MAPS[feature_map](q.to(wide)) * scale
    k, v = FEATURE_MAPS[feature_map](k.to(wide)), v.to(wide)
    decay = None if g is None else _per_channel(g.to(wide).exp(), q)  # [B, Q, H, K or 1]
    outputs = []
    for t in range(q.shape[1]):
        if decay is not None:
            state.mul_(decay[:, t, :, :, None])
        state.addcmul_(k[:, t, :, :, None], v[:, t, :, None])
        outputs.append(q[:, t, :, None] @ state)  # [B, H, 1, V]
    if lengths is not None:
        lengths.add_(q.shape[1])
    o = torch.cat(outputs, dim=2).transpose(1, 2)  # [B, Q, H, V]

    if norm is not None:
        o = o * (o.square().mean(NORM_AXES[norm], keepdim=True) + eps).rsqrt()
    if norm_weight is not None:
        o = o * norm_weight.to(wide)
    if gate is not None:
        gate = GATES[gate_activation](gate.to(wide))
        o = o * (gate if gate.dim() == 4 else gate[..., None])
    return o.to(dtype).contiguous()


def _per_channel(decay: Tensor, q: Tensor) -> Tensor:
    """A decay per channel, per token or constant as ``[B, Q, H, K or 1]``."""
    if decay.dim() == 1:
        decay = decay.expand(q.shape[:3])
    return decay if decay.dim() == 4 else decay[..., None]
