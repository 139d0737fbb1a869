"""Public function ``ls_attention``."""

from __future__ import annotations

from torch import Tensor

from attnvariants._types import AttentionStats, Window
from attnvariants.ops.softmax import attend


def ls_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    gate: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    gate_activation: str = "sigmoid",
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Long Short-attention: local heads with a short window beside global heads, in one call.

    ``out_h = softmax(softmax_scale * q_h k_h^T) v_h`` over the keys ``0 <= i - j < window[h]``
    (all keys up to ``i`` where ``window[h]`` is ``None``). Local heads cost ``T * window``, not
    ``T * T``. :func:`ls_window` builds the usual window tuple, local heads first;
    :func:`window_from_flash` converts FlashAttention's inclusive ``(left, 0)``.

    Args:
        q: ``[B, T, H, K]``, float16, bfloat16, float32 or float64 (and then all
            others too); ``K`` up to 256.
        k: ``[B, S, Hkv, K]``, dtype of ``q``; ``H`` is a multiple of ``Hkv``.
        v: ``[B, S, Hkv, V]``, dtype of ``q``; ``V`` up to 256, ``V != K`` allowed.
        window: an int for all heads, or one int or ``None`` per KV head. It counts the visible
            keys including the query's own.
        gate: optional logits ``[B, T, H, V]`` or ``[B, T, H]``; ``out`` is multiplied by their
            activation, as in :func:`gated_sdpa`.
        causal: a global head sees no key after the query. Local heads never do, so
            ``causal=False`` lets the global ones alone see all keys.
        softmax_scale: ``None`` is ``K ** -0.5``.
        gate_activation: ``"sigmoid"``, ``"ns_sigmoid"`` (1/2 + sigmoid/2) or ``"softplus"``.
        cu_seqlens: int32 ``[N + 1]``: bounds of ``N`` independent sequences packed along ``T``
            (``B == 1``, ``S == T``); the window holds within each.
        return_stats: also return :class:`AttentionStats`.
        impl: ``"auto"``, ``"reference"``, ``"eager"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``out`` ``[B, T, H, V]`` in ``v``'s dtype; ``(out, stats)`` with ``return_stats``. ``out``
        is kept for the backward and must not be modified in place before it.

    Raises:
        TypeError: an argument has the wrong type, or ``q`` is no floating tensor.
        ValueError: a shape, dtype, device or value does not fit; names the argument.
        NotImplementedError: an explicit ``impl`` cannot serve the call.

    Reference: Hajra, arXiv 2505.15548. Checkpoints of its code from 2025 take ``window = span``,
    those from 2026 (FlashAttention's inclusive window) ``window = span + 1``.
    """
    return attend(
        "ls_attention",
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
        impl=impl,
    )
