"""One decode step of softmax attention: the dense definition over the cached positions."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from attnvariants._checks import UNLIMITED
from attnvariants._types import AttentionStats
from attnvariants.kv_cache import KVCache
from attnvariants.reference.gated_sdpa import gated_sdpa


def attention_decode(
    q: Tensor,  # [B, Q, H, K]
    k: Tensor,  # [B, Q, Hkv, K]
    v: Tensor,  # [B, Q, Hkv, V]
    cache: KVCache,
    *,
    gate: Tensor | None = None,  # logits [B, Q, H, V] or [B, Q, H]
    softmax_scale: float | None = None,
    gate_activation: str = "sigmoid",
    return_stats: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """The definition; see :func:`attnvariants.attention_decode`.

    Row by row and head by head: the cached keys in the order of their positions, then the new
    ones; the Q queries are the last Q positions of that sequence.
    """
    q = rearrange(q, "b t (h group) d -> b t h group d", h=cache.num_kv_heads)
    if gate is not None:
        gate = rearrange(gate, "b t (h group) ... -> b t h group ...", h=cache.num_kv_heads)

    def attend(b: int, h: int) -> Any:
        keys, values = cached(cache, b, h)
        return gated_sdpa(
            q[b, :, h][None],
            torch.cat([keys, k[b, :, h]])[None, :, None],
            torch.cat([values, v[b, :, h]])[None, :, None],
            None if gate is None else gate[b, :, h][None],
            window=None if cache.windows[h] == UNLIMITED else cache.windows[h],
            softmax_scale=softmax_scale,
            gate_activation=gate_activation,
            return_stats=True,
            upcast=upcast,
        )

    rows = [[attend(b, h) for h in range(cache.num_kv_heads)] for b in range(cache.batch_size)]
    cache.append(k, v)
    out = torch.cat([torch.cat([out for out, _ in heads], dim=2) for heads in rows])
    if not return_stats:
        return out
    lse = torch.cat([torch.cat([stats.lse for _, stats in heads], dim=2) for heads in rows])
    max_logit = [torch.cat([stats.max_logit for _, stats in heads]) for heads in rows]
    return out, AttentionStats(torch.stack(max_logit).amax(0), lse)


def cached(cache: KVCache, row: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys ``[n, K]`` and values ``[n, V]`` that one row and KV head still hold, oldest first."""
    length, capacity = int(cache.lengths[row]), cache.capacities[head]
    positions = torch.arange(max(0, length - capacity), length, device=cache.device)
    slots = cache.offsets[head] + positions % capacity
    return cache.k[row, slots], cache.v[row, slots]
