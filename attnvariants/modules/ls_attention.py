"""LSAttention: local heads with a short window beside global heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnvariants._types import ls_window
from attnvariants.modules.gated_sdpa import GatedAttention
from attnvariants.ops.ls_attention import ls_attention


class LSAttention(GatedAttention):
    """Long Short-attention: the first KV heads see a window, the others all earlier tokens.

    ``y = concat(local heads, global heads) W_O``, with one output projection for both kinds.

    Args:
        embed_dim: model width ``C``.
        num_heads: query heads ``H``.
        num_local_heads: how many KV heads are local, from 0 to all; they come first. Without
            grouped queries KV heads are simply the heads.
        local_window: visible keys of a local head, the query's own included. (The author's 2025
            checkpoints take their span here, those of 2026 their span + 1.)
        num_kv_heads: key/value heads ``Hkv``; ``None`` is ``H``.
        head_dim: ``D``; ``None`` is ``embed_dim / num_heads``.
        bias: of all projections.
        gate: ``None``, or the sigmoid gate of :class:`GatedAttention` on the heads' outputs,
            ``"elementwise"`` or ``"headwise"``.
        qk_norm: RMSNorm of every head of q and k, before RoPE.
        rope_base: base of the rotary angles, ``None`` for no positions.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Reference: Hajra, arXiv 2505.15548.
    """

    _shown = (*GatedAttention._shown[:4], "num_local_heads", "local_window")
    _shown += ("gate", "qk_norm", "rope_base")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_local_heads: int,
        local_window: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        gate: str | None = None,
        qk_norm: bool = False,
        rope_base: float | None = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"gate": gate, "qk_norm": qk_norm, "rope_base": rope_base}
        options |= {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "bias": bias}
        super().__init__(embed_dim, num_heads, device=device, dtype=dtype, **options)
        self.window = ls_window(self.num_kv_heads, num_local_heads, local_window)
        self.num_local_heads = num_local_heads
        self.local_window = local_window

    @property
    def head_groups(self) -> list[str]:
        """``"local"`` or ``"global"`` for each query head."""
        local = self.num_local_heads * (self.num_heads // self.num_kv_heads)
        return ["local"] * local + ["global"] * (self.num_heads - local)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        return self._call(
            ls_attention, q, k, v, window=self.window, gate=gate, cu_seqlens=cu_seqlens
        )
