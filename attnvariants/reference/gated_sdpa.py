"""Gated SDPA: softmax attention times a gate, ``Y = act(L) * softmax(scale * Q K^T) V``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from torch import Tensor

from attnvariants._checks import UNLIMITED, sequence_bounds, state_dtype, windows
from attnvariants._types import AttentionStats, Window

GATE_ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "ns_sigmoid": lambda logits: 0.5 + 0.5 * torch.sigmoid(logits),
    "softplus": lambda logits: -F.logsigmoid(-logits),  # F.softplus cuts off at 20
}


def gated_sdpa(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, S, Hkv, K]
    v: Tensor,  # [B, S, Hkv, V]
    gate: Tensor | None = None,  # logits [B, T, H, V] or [B, T, H]
    *,
    causal: bool = True,
    window: Window = None,
    softmax_scale: float | None = None,
    gate_activation: str = "sigmoid",
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """The definition; see :func:`attnvariants.gated_sdpa`.

    ``upcast`` computes half precision inputs in float32 and rounds the result once; without it
    every operation runs and rounds in the dtype of its operands.
    """
    dtype, group = v.dtype, q.shape[2] // k.shape[2]
    if upcast:
        wide = state_dtype(dtype)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        gate = None if gate is None else gate.to(wide)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    visible = visible_keys(
        q.shape[1], k.shape[1], causal, windows("gated_sdpa", window, k.shape[2]), cu_seqlens, q
    )

    k, v = (repeat(x, "b s h d -> b s (h group) d", group=group) for x in (k, v))
    visible = repeat(visible, "h t s -> (h group) t s", group=group)
    logits = scale * einsum(q, k, "b t h k, b s h k -> b h t s")
    logits = logits.masked_fill(~visible, float("-inf"))
    p = logits.softmax(dim=-1).masked_fill(~visible, 0.0)  # a row that sees nothing gives 0
    out = einsum(p, v, "b h t s, b s h v -> b t h v")
    if gate is not None:
        gate = gate if gate.dim() == 4 else gate[..., None]
        out = out * GATE_ACTIVATIONS[gate_activation](gate)
    out = out.to(dtype)
    if not return_stats:
        return out
    statistics = state_dtype(dtype)
    max_logit = logits.detach().amax(dim=(0, 2, 3)).to(statistics)
    lse = logits.logsumexp(dim=-1).transpose(1, 2).to(statistics)
    return out, AttentionStats(max_logit, lse)


def visible_keys(
    queries: int,
    keys: int,
    causal: bool,
    windows: list[int],
    cu_seqlens: Tensor | None,
    like: Tensor,
) -> Tensor:
    """Which keys each query sees, ``[Hkv, T, S]``; the last query is aligned with the last key."""
    i = torch.arange(queries, device=like.device)[:, None] + keys - queries
    j = torch.arange(keys, device=like.device)
    far = (i >= j) if causal else torch.ones_like(i >= j)
    near = [far if w == UNLIMITED else (i >= j) & (i - j < w) for w in windows]
    visible = torch.stack(near)
    if cu_seqlens is not None:
        if not torch.compiler.is_compiling():
            sequence_bounds("gated_sdpa", cu_seqlens, keys)
        document = torch.bucketize(j, cu_seqlens[1:], right=True)
        visible = visible & (document[:, None] == document)
    return visible
