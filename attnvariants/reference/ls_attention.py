"""LS-attention: local heads see ``window`` keys, global heads all of them, in one layer."""

from __future__ import annotations

from torch import Tensor

from attnvariants._types import AttentionStats, Window
from attnvariants.reference.gated_sdpa import gated_sdpa


def ls_attention(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, S, Hkv, K]
    v: Tensor,  # [B, S, Hkv, V]
    *,
    window: Window,
    gate: Tensor | None = None,  # logits [B, T, H, V] or [B, T, H]
    causal: bool = True,
    softmax_scale: float | None = None,
    gate_activation: str = "sigmoid",
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """The definition; see :func:`attnvariants.ls_attention`.

    Head h is softmax attention over the keys ``0 <= i - j < window[h]``; the heads share nothing
    but the layout, so that this is :func:`gated_sdpa` with a window for every KV head.
    """
    return gated_sdpa(
        q,
        k,
        v,
        gate,
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        gate_activation=gate_activation,
        cu_seqlens=cu_seqlens,
        return_stats=return_stats,
        upcast=upcast,
    )
