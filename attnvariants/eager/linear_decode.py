"""Decode steps of linear attention in plain PyTorch, with the state updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from attnvariants._checks import state_dtype
from attnvariants.eager._epilogue import FEATURE_MAPS, Epilogue


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
    """One read-modify-write of the state per token; then the epilogue, in the state's dtype.

    A bf16 state is widened first and rounded at the end.
    """
    wide, dtype, shape = state_dtype(v.dtype), v.dtype, v.shape
    narrow, state = state, state.to(wide)
    phi = FEATURE_MAPS[feature_map].value
    q, k, v = phi(q.to(wide)) * scale, phi(k.to(wide)), v.to(wide)
    decay = None if g is None else _per_channel(g.to(wide).exp(), q)  # [B, Q, H, K or 1]
    outputs = []
    for t in range(shape[1]):
        if decay is not None:
            state.mul_(decay[:, t, :, :, None])
        state.addcmul_(k[:, t, :, :, None], v[:, t, :, None])
        outputs.append((q[:, t, :, None] @ state).squeeze(2))  # [B, H, V]
    if narrow is not state:
        narrow.copy_(state)
    if lengths is not None:
        lengths.add_(shape[1])
    o = torch.stack(outputs, dim=1).flatten(0, 1)  # [B * Q, H, V]
    gate = None if gate is None else gate.to(wide).flatten(0, 1)
    epilogue = Epilogue.of(norm, eps, norm_weight, gate_activation, wide)
    out, _, _ = epilogue.forward(o, gate)
    return out.to(dtype).view(shape)


def _per_channel(decay: Tensor, q: Tensor) -> Tensor:
    """A decay per channel, per token or constant as ``[B, Q, H, K or 1]``."""
    if decay.dim() == 1:
        decay = decay.expand(q.shape[:3])
    return decay if decay.dim() == 4 else decay[..., None]
