"""Norm linear attention as the paper's masked left product (arXiv 2210.10340)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from attnvariants import _checks
from attnvariants._types import AttentionStats
from attnvariants.reference._epilogue import epilogue
from attnvariants.reference._packed import initial_states, sequences, upcast_half

FEATURE_MAPS = {
    "elu+1": lambda x: F.elu(x) + 1,
    "elu": F.elu,
    "relu": F.relu,
    "silu": F.silu,
    None: lambda x: x,
}


def norm_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | None = "elu+1",
    decay: Tensor | None = None,
    causal: bool = True,
    norm: str | None = "model",
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    gate_activation: str | None = "sigmoid",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    upcast: bool = True,
) -> Any:
    """``O = [(phi(Q) phi(K)^T) * M * decay] V`` (no ``M`` if not causal), then the epilogue.

    Shapes and results as in :func:`attnvariants.norm_linear_attention`.
    """
    dtype, state_dtype = v.dtype, _checks.state_dtype(v.dtype)
    q, k, v, decay, norm_weight, gate = upcast_half(upcast, q, k, v, decay, norm_weight, gate)
    q, k = FEATURE_MAPS[feature_map](q), FEATURE_MAPS[feature_map](k)
    count = k.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    states = initial_states(initial_state, count, k, v, state_dtype)

    outputs, last, largest = [], [], []
    for n, t in sequences("norm_linear_attention", cu_seqlens, k.shape[0], k.shape[1]):
        scores = masked_scores(q[:, t], k[:, t], decay, causal)
        final = final_state(k[:, t], v[:, t], decay, states[n])
        o = einsum(scores.to(v.dtype), v[:, t], "b h i j, b j h v -> b i h v")
        if initial_state is not None:
            o = o + from_initial_state(q[:, t], decay, states[n], causal).to(v.dtype)
        outputs.append(o)
        last.append(final)
        if return_stats and scores.numel():
            largest.append(scores.detach().abs().amax((0, 2, 3)))

    out = epilogue(torch.cat(outputs, 1), norm, norm_weight, eps, gate, gate_activation).to(dtype)
    result: list[Any] = [out]
    if return_state:
        result.append(torch.cat(last))
    if return_stats:
        result.append(AttentionStats(torch.stack(largest).amax(0).to(state_dtype), None))
    return tuple(result) if len(result) > 1 else out


def power(decay: Tensor, distance: Tensor) -> Tensor:
    """``exp(decay * distance)`` per head, ``[H, *distance.shape]``; exact for ``-inf`` too."""
    decay = decay.view(-1, *[1] * distance.dim())
    return torch.where(distance > 0, decay * distance, 0.0).exp()


def masked_scores(q: Tensor, k: Tensor, decay: Tensor | None, causal: bool) -> Tensor:
    """``phi(q_i) . phi(k_j) * decay^(i-j)`` of the visible pairs, 0 elsewhere, ``[B, H, i, j]``."""
    scores = einsum(q, k, "b i h k, b j h k -> b h i j")
    if not causal:
        return scores
    if decay is None:
        return scores.tril()
    position = torch.arange(k.shape[1], device=k.device)
    distance = rearrange(position, "i -> i 1") - position
    return scores.tril() * power(decay, distance)


def from_initial_state(q: Tensor, decay: Tensor | None, state: Tensor, causal: bool) -> Tensor:
    """What the tokens before the first one contribute to every output, ``[B, T, H, V]``."""
    o = einsum(q.to(state.dtype), state, "b i h k, b h k v -> b h i v")
    distance = torch.arange(1, q.shape[1] + 1, device=q.device)
    if causal and decay is not None:
        o = o * power(decay, distance).unsqueeze(-1)
    return rearrange(o, "b h i v -> b i h v")


def final_state(k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor) -> Tensor:
    """``sum_j decay^(T-1-j) phi(k_j) v_j^T + decay^T S_0``, ``[B, H, K, V]``."""
    length = k.shape[1]
    if decay is not None:
        distance = torch.arange(length - 1, -1, -1, device=k.device)
        k = k * rearrange(power(decay, distance), "h j -> j h 1")
        state = state * power(decay, torch.tensor(length, device=k.device)).view(-1, 1, 1)
    k, v = k.to(state.dtype), v.to(state.dtype)
    return state + einsum(k, v, "b j h k, b j h v -> b h k v")
