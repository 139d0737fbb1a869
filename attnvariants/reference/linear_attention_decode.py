"""Decode steps of linear attention: the recurrence, carried on from the state."""

from __future__ import annotations

import torch
from torch import Tensor

from attnvariants.recurrent_state import RecurrentState
from attnvariants.reference._packed import upcast_half
from attnvariants.reference.gated_linear_attention import gated_linear_attention
from attnvariants.reference.norm_linear_attention import FEATURE_MAPS


def linear_attention_decode(
    q: Tensor,  # [B, Q, H, K]
    k: Tensor,  # [B, Q, H, K]
    v: Tensor,  # [B, Q, H, V]
    g: Tensor | None,  # [B, Q, H, K], [B, Q, H] or [H]
    state: RecurrentState | Tensor,  # [B, H, K, V]
    *,
    scale: float | None = None,
    feature_map: str | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    gate_activation: str | None = "silu",
    upcast: bool = True,
) -> Tensor:
    """The definition; see :func:`attnvariants.linear_attention_decode`."""
    dtype = v.dtype
    q, k, v = upcast_half(upcast, q, k, v)
    buffer = state.state if isinstance(state, RecurrentState) else state
    initial = buffer.float() if buffer.dtype == torch.bfloat16 else buffer
    out, final = gated_linear_attention(
        FEATURE_MAPS[feature_map](q),
        FEATURE_MAPS[feature_map](k),
        v,
        g,
        scale=scale,
        norm=norm,
        norm_weight=norm_weight,
        eps=eps,
        gate=gate,
        gate_activation=gate_activation,
        initial_state=initial,
        return_state=True,
        upcast=upcast,
    )
    if isinstance(state, RecurrentState):
        state.update(final, q.shape[1])
    else:
        buffer.copy_(final)
    return out.to(dtype)
