"""Gated linear attention as its recurrence, one token at a time (arXiv 2312.06635)."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from torch import Tensor

from attnvariants import _checks
from attnvariants._types import AttentionStats
from attnvariants.reference._epilogue import epilogue
from attnvariants.reference._packed import initial_states, sequences, upcast_half


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    gate_activation: str | None = "silu",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    upcast: bool = True,
) -> Any:
    """``S_t = diag(exp g_t) S_{t-1} + k_t v_t^T``, ``o_t = scale * S_t^T q_t``, then the epilogue.

    Shapes and results as in :func:`attnvariants.gated_linear_attention`.
    """
    dtype, state_dtype = v.dtype, _checks.state_dtype(v.dtype)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g, norm_weight, gate = upcast_half(upcast, q, k, v, g, norm_weight, gate)
    g = log_decay(g, k)
    count = k.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    states = initial_states(initial_state, count, k, v, state_dtype)

    outputs, last, largest = [], [], []
    for n, t in sequences("gated_linear_attention", cu_seqlens, k.shape[0], k.shape[1]):
        o, state = recurrence(q[:, t], k[:, t], v[:, t], g[:, t], states[n])
        outputs.append(o)
        last.append(state)
        if return_stats:
            largest.append(largest_score(q[:, t], k[:, t], g[:, t]))

    o = (scale * torch.cat(outputs, 1)).to(v.dtype)
    out = epilogue(o, norm, norm_weight, eps, gate, gate_activation).to(dtype)
    result: list[Any] = [out]
    if return_state:
        result.append(torch.cat(last))
    if return_stats:
        max_logit = abs(scale) * torch.stack(largest).amax(0)
        result.append(AttentionStats(max_logit.to(state_dtype), None))
    return tuple(result) if len(result) > 1 else out


def log_decay(g: Tensor | None, k: Tensor) -> Tensor:
    """``g`` of any shape, or 0 for ``None``, as ``[B, T, H, K]`` or ``[B, T, H, 1]``."""
    if g is None:
        return torch.zeros((), dtype=k.dtype, device=k.device).expand(*k.shape[:3], 1)
    if g.dim() == 1:
        return g.expand(k.shape[:3]).unsqueeze(-1)
    return g if g.dim() == 4 else g.unsqueeze(-1)


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """``S_t^T q_t`` for every token ``[B, T, H, V]``, and the last state ``[B, H, K, V]``."""
    outputs = [v.new_empty(v.shape[0], 0, *v.shape[2:])]
    for t in range(k.shape[1]):
        write = einsum(k[:, t], v[:, t], "b h k, b h v -> b h k v")
        state = g[:, t].exp().unsqueeze(-1) * state + write
        outputs.append((q[:, t].unsqueeze(-1) * state).sum(-2).unsqueeze(1))
    return torch.cat(outputs, 1), state


@torch.no_grad()
def largest_score(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """``max |q_i . k_j * decay_ij|`` over the pairs ``i >= j``, ``[H]``."""
    largest = k.new_full((k.shape[2],), -torch.inf)
    decayed = k.clone()  # at step t: k_j * exp(g_{j+1} + ... + g_t)
    for t in range(k.shape[1]):
        decayed[:, :t] *= g[:, t : t + 1].exp().to(k.dtype)
        scores = einsum(q[:, t], decayed[:, : t + 1], "b h k, b j h k -> b j h")
        largest = torch.maximum(largest, scores.abs().amax((0, 1)))
    return largest
