"""DiagAttention: attention inside blocks of the sequence, transNormer's early layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnvariants import _checks
from attnvariants.kv_cache import KVCache
from attnvariants.modules._common import (
    KeyValueLayer,
    filled,
    positive,
    repeat_heads,
    split_heads,
    widen,
)
from attnvariants.modules._positions import LRPE, token_positions
from attnvariants.ops.attention_decode import attention_decode
from attnvariants.ops.diag import ACTIVATIONS
from attnvariants.ops.diag_attention import diag_attention_with_stats


class DiagAttention(KeyValueLayer):
    """Attention inside non-overlapping blocks: ``softmax(q k^T / sqrt(D)) v``, or ``relu`` of it.

    No token sees another block. The relu form has no row sum; an RMSNorm over all heads' channels
    together follows it instead (the softmax form has no norm). Its cache holds one block.

    Args:
        embed_dim: model width ``C``.
        num_heads: query heads ``H``.
        num_kv_heads: key/value heads ``Hkv``; ``None`` is ``H``.
        head_dim: ``D``; ``None`` is ``embed_dim / num_heads``.
        bias: of all projections.
        block_size: tokens per block.
        activation: ``"softmax"`` (T2) or ``"relu"`` (T1).
        causal: a token sees no later one. Otherwise its whole block; there is no cache then.
        lrpe: reflect and rotate q and k, see :class:`attnvariants.modules._positions.LRPE`.
        norm_eps: inside the root of the relu form's norm.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Reference: Qin et al., "The Devil in Linear Transformer", arXiv 2210.10340.
    """

    _shown = (*KeyValueLayer._shown, "block_size", "activation", "causal")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        block_size: int = 64,
        activation: str = "softmax",
        causal: bool = True,
        lrpe: bool = False,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim)
        name = type(self).__name__
        _checks.flag(name, "bias", bias)
        _checks.positive_int(name, "block_size", block_size)
        _checks.choice(name, "activation", activation, ACTIVATIONS)
        _checks.flag(name, "causal", causal)
        _checks.flag(name, "lrpe", lrpe)
        self.window = self.block_size = block_size
        self.activation = activation
        self.causal = causal
        self.norm_eps = positive(name, "norm_eps", norm_eps, or_zero=True)
        self.logit_kind = "softmax_logit" if activation == "softmax" else "linear_score"

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, width, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_width, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_width, bias=bias, **factory)
        self.o_proj = nn.Linear(width, embed_dim, bias=bias, **factory)
        self.lrpe = LRPE("reflect", self.head_dim, **factory) if lrpe else None

    @property
    def head_groups(self) -> list[str]:
        """``"local"`` for each query head."""
        return ["local"] * self.num_heads

    def init_cache(
        self, batch_size: int, max_length: int, *, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache: a ring of ``block_size`` keys and values per head."""
        self._require_causal()
        return super().init_cache(batch_size, max_length, dtype=dtype)

    def _check_cache(self, cache: Any) -> dict[str, tuple[Any, Any]]:
        self._require_causal()
        return super()._check_cache(cache)

    def _require_causal(self) -> None:
        if not self.causal:
            raise ValueError("DiagAttention: a layer with causal=False takes no cache")

    def _attend(self, x: Tensor, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        q = split_heads(self.q_proj(x), self.num_heads)  # [B, T, H, D]
        k = split_heads(self.k_proj(x), self.num_kv_heads)  # [B, T, Hkv, D]
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        past = filled(cache)
        if self.lrpe is not None:
            positions = token_positions(x, past, cu_seqlens)
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)

        if past is not None:
            past.reserve(type(self).__name__, x.shape[1])
            if x.shape[1] == 1 and self.activation == "softmax":
                out = self._decode(q, k, v, past)
            else:
                pieces = (t.split(self.block_size, dim=1) for t in (q, k, v))
                steps = [self._step(*piece, cache=past) for piece in zip(*pieces, strict=True)]
                out = torch.cat(steps, dim=1)
        else:
            out, max_logit = diag_attention_with_stats(
                q,
                k,
                v,
                block_size=self.block_size,
                activation=self.activation,
                causal=self.causal,
                cu_seqlens=cu_seqlens,
                stats=self._running_max is not None,
            )
            if max_logit is not None:
                self._record(max_logit)
            if cache is not None:
                self._append(cache, k, v, cu_seqlens)
        out = out.flatten(2)
        if self.activation == "relu":
            out = F.rms_norm(widen(out), out.shape[-1:], eps=self.norm_eps).to(out.dtype)
        return self.o_proj(out)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        """One new token: a decode step over a cache that holds the open block only.

        The ring has a slot for each token of a block, so the open block fills it from slot 0 on.
        """
        block = copy.copy(cache)
        block.lengths = cache.lengths % self.block_size
        block.max_filled = min(cache.max_filled, block.capacities[0])
        with torch.autocast(q.device.type, enabled=False):
            q, k, v_new = (t.to(cache.dtype) for t in (q, k, v))
            out: Tensor = self._call(attention_decode, q, k, v_new, block)
        cache.lengths.add_(1)
        cache.advance(1)
        return out.to(v.dtype)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, *, cache: KVCache) -> Tensor:
        """At most a block of new tokens: those of the cached block and each other."""
        dtype, groups = v.dtype, self.num_heads // self.num_kv_heads
        new = torch.arange(q.shape[1], device=q.device)
        position = cache.lengths[:, None] + new  # [B, T]
        block = position // self.block_size
        capacity = cache.capacities[0]
        slot = torch.arange(capacity, device=q.device)
        filled = slot < (cache.lengths % self.block_size)[:, None]  # [B, slots]
        open_block = (cache.lengths // self.block_size)[:, None]
        old_seen = filled[:, None] & (block == open_block)[..., None]  # [B, T, slots]
        new_seen = (block[:, :, None] == block[:, None]) & (new[:, None] >= new)  # [B, T, T]
        visible = torch.cat([old_seen, new_seen], dim=-1)[:, None]  # [B, 1, T, keys]

        with torch.autocast(q.device.type, enabled=False):
            q, k, v = (t.to(cache.dtype) for t in (q, k, v))
            rings = (t.unflatten(1, (-1, capacity)).transpose(1, 2) for t in (cache.k, cache.v))
            keys, values = (
                widen(repeat_heads(torch.cat([ring, t], dim=1), groups)).transpose(1, 2)
                for ring, t in zip(rings, (k, v), strict=True)
            )  # [B, H, keys, D]
            logits = self.head_dim**-0.5 * widen(q).transpose(1, 2) @ keys.transpose(2, 3)
            seen = logits.masked_fill(~visible, float("-inf"))
            weights = seen.softmax(dim=-1) if self.activation == "softmax" else seen.relu()
            out = (weights @ values).transpose(1, 2).to(dtype)  # [B, T, H, D]
            self._record(seen.detach().amax(dim=(0, 2, 3)))
            cache.append(k, v)
        return out
